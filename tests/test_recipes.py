"""The recipes at toy size: tiny random networks go the whole way from jobs to tables, plots and cards."""

import importlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fewstep.decode.requests import Output
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.json_files import write_json_whole
from fewstep.measure.evaluate import Record, Report, evaluate
from fewstep.measure.reports import merge_reports, report_columns, with_no_fewer_passes
from fewstep.models.adapters import write_share
from fewstep.models.load import load_network, save_network
from fewstep.models.names import BUNDLED
from fewstep.models.tiny import tiny_network
from fewstep.tasks.gsm_symbolic import problems
from fewstep.train.collect import collect, decode_with, distribution_of, teacher_of
from fewstep.train.examples import Examples, cut_after_end
from fewstep.train.records import PromptRow

CANVAS = 16
TOY_BLOCK = 8
NUM_PROMPTS = 12


def test_speedrun_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = importlib.import_module("speedrun")
    words = recipe.rows
    monkeypatch.setattr(recipe, "rows", lambda count, seed: words(min(count, 64), seed))
    trained: list[str] = []
    recipe_train = recipe.train

    def train(network: Any, objective: Any, settings: Any, output: Path) -> Any:
        trained.append(output.name)
        if trained == ["causal", "teacher", "student"]:
            raise KeyboardInterrupt
        return recipe_train(network, objective, settings, output)

    monkeypatch.setattr(recipe, "train", train)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(output=tmp_path, steps=2, test=2)
    recipe.main(output=tmp_path, steps=2, test=2)
    assert trained == ["causal", "teacher", "student", "student"]
    assert re.findall(r"^(causal|teacher|student) ", capsys.readouterr().out, re.M) == ["causal", "teacher", "student"]
    with pytest.raises(FewstepError, match=r"causal holds a model of 2 steps, not 3; name another --output, or remove"):
        recipe.main(output=tmp_path, steps=3, test=2)


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return importlib.import_module("gsm_ablation")


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    return importlib.import_module("gsm_measure")


@pytest.fixture(scope="module")
def throughput() -> ModuleType:
    return importlib.import_module("gsm_throughput")


@pytest.fixture
def toy_blocks(
    ablation: ModuleType, measure: ModuleType, throughput: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipes' blocks are those of the bundled student; toys have shorter ones."""
    for module in (ablation, measure, throughput, importlib.import_module("pipeline")):
        monkeypatch.setattr(module, "BLOCK", TOY_BLOCK)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ar and teacher with random weights, and the teacher's trajectories."""
    folder = tmp_path_factory.mktemp("toys")
    shape: dict[str, Any] = {
        "hidden": 16,
        "layers": 1,
        "block_size": TOY_BLOCK,
        "max_positions": 1024,
        "context_attention": "causal",
    }
    save_network(tiny_network("autoregressive", **shape), folder / "ar")
    save_network(tiny_network("bidirectional", right_shift_logits=True, head_scale=30, **shape), folder / "teacher")
    teacher = load_network(folder / "teacher")
    rows = [PromptRow(str(i), [3, 5 + i, 6, 4], [7, 8 + i, 9, 1]) for i in range(NUM_PROMPTS)]
    distribution = distribution_of(teacher, top_k=8)
    decoder = LanguageModel(teacher).decoder(max_new_tokens=CANVAS)
    asked: dict[str, Any] = {"max_new_tokens": CANVAS, "early_stop": False}
    decoding = decode_with(teacher, decoder, batch_size=NUM_PROMPTS, distribution=distribution, **asked)

    def with_an_end(rows: Sequence[PromptRow], seeds: Sequence[int]) -> list[Output]:
        outputs = decoding(rows, seeds)
        for output in outputs:
            output.canvas_ids_G[CANVAS - 4] = teacher.eos_token_id
        return list(outputs)

    collect(
        with_an_end,
        rows,
        folder / "trajectories",
        teacher=teacher_of(teacher),
        settings={"steps": CANVAS},
        distribution=distribution,
    )
    return folder


def failing() -> dict[str, Any]:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (FewstepError("no such thing; name another"), 2, "no such thing; name another"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("interrupted; results kept in x: 1"), 130, "interrupted; results kept in x: 1"),
        (PermissionError(13, "Permission denied", "x"), 2, "could not use x: Permission denied"),
    ],
)
def test_a_recipe_ends_in_one_sentence(
    error: BaseException, code: int, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_recipe = importlib.import_module("run_recipe")
    app = run_recipe.typer.Typer()

    @app.command()
    def main() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["recipes/some.py"])
    with pytest.raises(SystemExit) as ended:
        run_recipe.run_recipe(app)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"{run_recipe.NAME}: {sentence}\n"


# --- ablation ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toy_blocks")
def test_the_ablation_makes_every_row_with_equal_tokens_and_a_report(
    ablation: ModuleType, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, runs = tmp_path / "results", tmp_path / "runs"
    study = ablation.Ablation(
        results=results, runs=runs, teacher=str(toys / "teacher"), store=toys / "trajectories", threshold=(0.5, 0.9),
        teacher_steps=(4,), seeds=2, dev=3, steps=2, rows=2, row_length=128, rank=2, max_new_tokens=CANVAS,
        batch_size=16,
    )  # fmt: skip
    study.run()
    assert not list((results / "ablation").glob("*.failed"))
    rows = json.loads((results / "ablation.json").read_text())
    trained = [row for row in rows if row["variant"] in ablation.VARIANTS]
    assert sorted({(row["variant"], row["seed"], row["threshold"]) for row in trained}) == sorted(
        (variant, seed, threshold) for variant in ablation.VARIANTS for seed in (0, 1) for threshold in (0.5, 0.9)
    )
    promised = {"accuracy", "accuracy_ci95", "tokens_per_forward", "tokens_per_forward_correct", "step_ms", "n"}
    assert all(promised <= row.keys() and len(row["correct"]) == 3 for row in rows)
    tokens = [row["training_tokens"] for row in trained]
    assert min(tokens) > 0.8 * 2 * 2 * 128  # rows are packed almost full, whatever the variant
    before = {path: path.stat().st_mtime_ns for path in (results / "ablation").glob("*.json")}
    monkeypatch.setattr(ablation.Ablation, "variant", failing)
    study.run()
    assert before == {path: path.stat().st_mtime_ns for path in (results / "ablation").glob("*.json")}
    for other, told in (({"steps": 3}, "steps is 2 there and 3 here"), ({"dev": 4}, "dev is 3 there and 4 here")):
        with pytest.raises(FewstepError, match=told):
            replace(study, **other).run()
    with pytest.raises(FewstepError, match=r"runs/variant-1-seed-0\.json keeps a result .*rank is 2 there and 4 here"):
        replace(study, results=tmp_path / "others", rank=4).run()
    ablation.report(results, threshold=0.9)
    text = (results / "ablation.md").read_text()
    assert all(variant.title in text for variant in ablation.VARIANTS.values())
    assert (results / "ablation.png").exists()
    assert (results / "ablation.svg").exists()


def test_teacher_text_ends_with_its_end_of_text_and_holds_no_mask() -> None:
    examples = Examples.from_ids([[3], [4], [5]], [[7, 1, 9], [7, 8, 9], [7, 2, 1]])
    kept = cut_after_end(examples, eos_token_id=1, mask_token_id=2)
    assert kept.prompt_ids.tolist() == [3]
    assert kept.completion_ids.tolist() == [7, 1]


# --- measuring --------------------------------------------------------------------------------------------------------


def report_of(
    model: str, marks: str, forwards: int, threshold: float | None = None, ids: Sequence[str] = "abcd"
) -> Report:
    records = [
        Record(id=name, template=i % 2, answer="1", text="", correct=mark == "1", num_tokens=12, num_forwards=forwards,
               seconds=1.0, finish_reason="stop")
        for i, (name, mark) in enumerate(zip(ids, marks, strict=True))
    ]  # fmt: skip
    return Report(
        model=model, role="", decoder="", engine="off", task="", threshold=threshold, gaps=None, block_size=None,
        steps=None, batch_size=1, dtype="", device="", records=records, wall_seconds=1.0, step_ms=1.0,
    )  # fmt: skip


def test_the_fastest_threshold_that_is_good_enough_is_chosen(measure: ModuleType) -> None:
    dev = {
        "teacher": report_of("t", "1100", 12),
        "student-0.8": report_of("s", "1000", 2, 0.8),
        "student-0.9": report_of("s", "0110", 3, 0.9),
        "student-0.99": report_of("s", "1111", 6, 0.99),
    }
    assert measure.choose_threshold(dev, slack=0.0) == 0.9
    assert measure.choose_threshold(dev, slack=0.25) == 0.8
    assert (
        measure.choose_threshold({**dev, "teacher": replace(dev["teacher"], records=dev["student-0.99"].records)}, 0.0)
        == 0.99
    )


def test_contenders_are_compared_on_the_problems_that_both_answered(measure: ModuleType) -> None:
    found = {
        "student-0.9": report_of("s", "0110", 3, 0.9),
        "teacher": report_of("t", "11", 12, ids="bc"),
        "ar": report_of("a", "11", 12, ids="xy"),
    }
    (row,) = measure.compared(found, 0.9)
    assert (row["first"], row["second"], row["n"], row["difference"]) == ("student-0.9", "teacher", 2, 0.0)


def test_shards_of_other_settings_are_not_merged() -> None:
    items = {one.id: one for one in problems("dev", 2)}
    one, other = (
        report_columns(report_of("s", "1", 3, threshold, ids=[name]))
        for name, threshold in zip(items, (0.9, 0.8), strict=True)
    )
    assert merge_reports([one, one], items).n == 2
    with pytest.raises(FewstepError, match="shards of one report differ in threshold; empty their folder"):
        merge_reports([one, other], items)


def test_the_teacher_with_the_students_passes_has_no_fewer() -> None:
    found = {f"teacher-steps-{steps}": report_of("t", "1111", steps) for steps in (2, 4, 8)}
    assert with_no_fewer_passes(found, report_of("s", "1111", 3)) == "teacher-steps-4"
    assert with_no_fewer_passes(found, report_of("s", "1111", 9)) is None


@pytest.mark.usefixtures("toy_blocks")
def test_all_figures_reach_the_cards(
    measure: ModuleType,
    ablation: ModuleType,
    throughput: ModuleType,
    toys: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results, bundled = tmp_path / "results", tmp_path / "bundled"
    for name, toy in (("ar", "ar"), ("cllm", "ar"), ("teacher", "teacher")):
        save_network(load_network(toys / toy), bundled / f"gsm-{name}")
    study = ablation.Ablation(
        runs=bundled, teacher=str(bundled / "gsm-teacher"), store=toys / "trajectories", steps=4, rows=2,
        row_length=128, rank=2,
    )  # fmt: skip
    study.trained("gsm-student", ablation.ALL_THREE, seed=0)
    models = {
        "ar": str(bundled / "gsm-ar"),
        "cllm": str(bundled / "gsm-cllm"),
        "teacher": str(bundled / "gsm-teacher"),
        "student": str(bundled / "gsm-student"),
    }

    monkeypatch.setattr(sys, "argv", ["gsm_measure.py", "accuracy"])
    measure.accuracy(
        results, **models, test=5, heldout=2, dev=3, published=2, threshold=[0.5, 0.9], teacher_steps=[4],
        max_new_tokens=CANVAS, shard=2, batch_size=4, problem_folder=tmp_path,
    )  # fmt: skip
    assert not list((results / "accuracy").glob("*.failed"))
    found = json.loads((results / "accuracy.json").read_text())
    rows = {(row["set"], row["contender"]): row for row in found["rows"]}
    assert rows["test", "teacher"]["n"] == 5
    whole = evaluate(LanguageModel(load_network(models["teacher"])), problems("test", 5), max_new_tokens=CANVAS)
    assert rows["test", "teacher"]["num_forwards_mean"] == whole.to_json()["num_forwards_mean"]
    assert (found["chosen_threshold"] in (0.5, 0.9), found["gaps"]) == (True, 2)
    assert {row["n"] for row in found["without_stopping"]} == {2}
    student = f"student-{found['chosen_threshold']}"
    assert ("test", student, "teacher") in {(row["set"], row["first"], row["second"]) for row in found["comparisons"]}

    measure.timing(results, **models, num=2, max_new_tokens=CANVAS)
    timed = json.loads((results / "timing-cpu.json").read_text())
    factors = timed["factors"]
    assert factors["total"] == pytest.approx(factors["stopping"] * factors["caching"] * factors["fewer_passes"])

    throughput.main(
        results, teacher=models["teacher"], store=toys / "trajectories", steps=4, rows=2, row_length=256,
        shape="tiny-llama", shape_rows=1, matmul_size=64,
    )  # fmt: skip
    trained = json.loads((results / "throughput.json").read_text())
    assert not trained["failed"]
    assert all(row["share_of_matmul_rate"] > 0 for row in trained["rows"])
    assert [(row["shape"], row["rows"]) for row in trained["rows"]] == [(None, 2)] * 5 + [("tiny-llama", 1)] * 2

    measure.cards(results, bundled=bundled, student_report=bundled / "gsm-student" / "report.json")
    card = (bundled / "gsm-student" / "README.md").read_text()
    report = json.loads((bundled / "gsm-student" / "report.json").read_text())
    assert f"{report['real_tokens']:,}" in card
    assert f"stopping {factors['stopping']:.2f}" in card
    assert "LoRA, rank 2" in card
    assert "(accuracy.png)" in card
    assert (bundled / "gsm-student" / "accuracy.png").exists()
    assert "license: apache-2.0" in (bundled / "gsm-ar" / "README.md").read_text()


def test_the_card_of_a_drafter_has_what_was_measured_on_every_kind_of_problems(tmp_path: Path) -> None:
    cards = importlib.import_module("gsm_cards")
    figures = [
        {"window": 31, "branches": 0, "n": 10_000, "identical": 0.9996, "tokens_per_forward": 7.217},
        {"window": 31, "branches": 2, "n": 10_000, "identical": 0.9999, "tokens_per_forward": 8.786},
    ]
    for name, device in (("test", "cuda:0"), ("dev", "cpu")):
        told = {"command": f"draft.py measure {name}.jsonl", "machine": {"gpu": "a GPU"}, "dtype": "float32"}
        told |= {"device": device, "figures": figures}
        (tmp_path / "draft").mkdir(exist_ok=True)
        (tmp_path / "draft" / f"{name}.json").write_text(json.dumps(told))
    sources = cards.Sources(tmp_path, [])
    text = cards.card("gsm-draft", "draft", BUNDLED / "gsm-draft", None, sources)
    assert "`draft.py measure test.jsonl`, float32, on a GPU:" in text
    assert "`draft.py measure dev.jsonl`, float32, on a CPU:" in text
    assert text.count("| 31 | two-pass | 10,000 | 99.96 % | 7.22 |") == 2
    assert text.count("| 31 | fused, 2 branches | 10,000 | 99.99 % | 8.79 |") == 2
    assert {"draft/test-bfloat16.json", "draft/heldout.json"} <= set(sources.missing)


def test_a_shape_is_known_by_itself_and_not_by_the_names_of_cases(throughput: ModuleType) -> None:
    cases = throughput.throughput_cases("none", None, None, device="cpu", rank=2, shape="cdlm")
    assert [case.name for case in cases if case.shape is not None] == [
        "causal, cdlm",
        "teacher (masked diffusion), cdlm",
    ]


def test_decoders_that_verify_are_lossless_on_a_bundled_model(tmp_path: Path) -> None:
    lossless = importlib.import_module("lossless")
    with pytest.raises(lossless.typer.Exit) as ended:
        lossless.main(results=tmp_path, model=["gsm-cllm"], count=3, max_new_tokens=20, batch_size=2, device="cpu")
    assert ended.value.exit_code == 0
    rows = json.loads((tmp_path / "lossless.json").read_text())["rows"]
    assert [row["same"] for row in rows] == [3] * 7
    one, other = (SimpleNamespace(token_ids=ids, num_tokens=2, num_forwards=1) for ids in ([1, 2], [1, 3]))
    wrong = lossless.same_answers([one, one], [one, other])
    assert (wrong["same"], wrong["n"], wrong["tokens_per_forward"]) == (1, 2, 2.0)


def test_the_contenders_of_the_cpu_engine_write_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = importlib.import_module("cpu_engine")
    monkeypatch.setattr(recipe, "first_token_seconds", lambda: 1.0)
    recipe.main(problems=1, starts=1, output=tmp_path / "cpu.json")
    found = json.loads((tmp_path / "cpu.json").read_text())
    causal = {name: count for name, count in found["identical"].items() if not name.startswith("student, engine")}
    assert set(causal.values()) == {1}
    assert found["timings"].keys() == found["identical"].keys() == found["solved"].keys()
    assert found["solved"]["causal, transformers"] == found["solved"]["causal, plain"]
    assert found["ratios"].keys() == recipe.RATIOS.keys()
    assert "causal: transformers / engine" in capsys.readouterr().out


def test_a_share_of_an_adapter_scales_what_it_adds(tmp_path: Path) -> None:
    source = BUNDLED / "gsm-cllm"
    write_share(source, tmp_path / "half", 0.5)
    config = json.loads((tmp_path / "half" / "adapter_config.json").read_text())
    write_json_whole(tmp_path / "half" / "adapter_config.json", {**config, "base_model_name_or_path": "gsm-ar"})
    base, half, whole = (load_network(name).module.state_dict() for name in ("gsm-ar", tmp_path / "half", source))
    name = "model.layers.3.mlp.up_proj.weight"
    torch.testing.assert_close(half[name] - base[name], 0.5 * (whole[name] - base[name]), atol=1e-6, rtol=1e-4)
    assert not torch.equal(half[name], base[name])


def test_the_recipe_in_embedding_space_goes_from_the_teacher_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = importlib.import_module("embedding")
    monkeypatch.setattr(recipe, "MAX_ANSWER", CANVAS)
    monkeypatch.setattr(recipe, "BUNDLED_TEACHERS", ("teacher",))
    teacher = tiny_network("bidirectional", context_attention="causal", right_shift_logits=True, max_positions=512)
    save_network(teacher, tmp_path / "teacher")
    examples = Examples.from_ids([[3, 10 + i, 4] for i in range(12)], [[20 + i, 21 + i, 1] for i in range(12)])
    (tmp_path / "data").mkdir()
    save_file(examples.tensors(), tmp_path / "data" / "part-0000-12.safetensors")
    monkeypatch.setattr(recipe, "CANVAS", replace(recipe.CANVAS, block_size=TOY_BLOCK))
    short: dict[str, Any] = {"runs": tmp_path, "steps": 2, "rows": 1, "row_length": 256, "dev": 1, "warmup_steps": 1}
    first = replace(recipe.DENOISER, **short, source="teacher", answer_steps=2)
    monkeypatch.setattr("stages.MAX_ANSWER", CANVAS)
    first.run()
    second = replace(
        first, source="denoiser", name="shortcuts", warp_examples=4,
        training=recipe.EmbeddingSettings(objective="shortcut", most_steps=4, canvases=2),
    )  # fmt: skip
    second.run()
    second.run()  # is there
    monkeypatch.setattr(recipe, "prompt_rows", lambda tok, count, seed: ([PromptRow("0", [3, 10, 4], None)], {}))
    recipe.CollectPaths(
        runs=tmp_path, source="denoiser", name="paths", prompts=1, steps=4, points=2, canvas_length=CANVAS
    ).run()
    replace(
        second, name="trajectories", store="paths", warp_examples=0,
        training=recipe.EmbeddingSettings(objective="trajectories"),
    ).run()  # fmt: skip
    measuring = recipe.Measuring(
        runs=tmp_path, models=("denoiser", "shortcuts", "teacher", "absent"), passes=(2, 1), problems=2, seeds=2,
        seeded=1,
    )  # fmt: skip
    measuring.run()
    measuring.run()
    table = (tmp_path / "results" / "table.md").read_text()
    assert len(table.splitlines()) == 5
    assert re.search(r"^\| shortcuts \| shortcut \| \d", table, re.M)
    assert re.search(r"^\| teacher \| diffusion \| \d", table, re.M)
    assert "absent is not trained yet" in capsys.readouterr().out
