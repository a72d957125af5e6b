"""Evaluation, comparison, timing and plots on tiny random networks."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.measure.compare import compare
from fewstep.measure.evaluate import Record, Report, evaluate, sweep
from fewstep.measure.plots import plot_accuracy
from fewstep.measure.timing import Timing, describe_machine, speed_factors, time_interleaved, write_figures
from fewstep.models.tiny import tiny_network
from fewstep.tasks.problems import Problem

PROBLEMS = [Problem(f"p{i}", f"what is {i} + {i}?", str(2 * i), template=i % 3) for i in range(5)]

# The keys that the design promises for `eval --json`.
EVAL_KEYS = [
    "model",
    "role",
    "decoder",
    "engine",
    "task",
    "threshold",
    "gaps",
    "block_size",
    "steps",
    "batch_size",
    "dtype",
    "device",
    "n",
    "accuracy",
    "accuracy_ci95",
    "num_tokens_mean",
    "num_forwards_mean",
    "tokens_per_forward",
    "tokens_per_forward_correct",
    "seconds_median",
    "tokens_per_second",
    "step_ms",
]


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return LanguageModel(tiny_network("block_causal"))


def report(name: str, *rights: bool, tokens: int = 10, forwards: int = 5, **changes: Any) -> Report:
    records = [
        Record(
            id=f"p{i}",
            template=i,
            answer="1",
            text="",
            correct=right,
            num_tokens=tokens,
            num_forwards=forwards,
            seconds=2.0,
            finish_reason="stop",
        )
        for i, right in enumerate(rights)
    ]
    made = Report(
        model=name,
        role="block_causal",
        decoder="block",
        engine="off",
        task="gsm-symbolic",
        threshold=0.9,
        gaps=None,
        block_size=32,
        steps=None,
        batch_size=1,
        dtype="float32",
        device="cpu",
        records=records,
        wall_seconds=4.0,
        step_ms=1.0,
    )
    return dataclasses.replace(made, **changes)


# --- evaluate ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_report_has_the_promised_keys_and_one_record_each(student: LanguageModel, batch_size: int) -> None:
    calls: list[None] = []
    found = evaluate(
        student,
        PROBLEMS,
        batch_size=batch_size,
        max_new_tokens=8,
        threshold=0.5,
        gaps=2,
        progress=lambda: calls.append(None),
    )
    as_json = found.to_json()
    assert list(as_json) == EVAL_KEYS
    json.dumps(as_json, allow_nan=False)
    json.dumps(found.records_json(), allow_nan=False)
    assert [record.id for record in found.records] == [problem.id for problem in PROBLEMS]
    assert len(calls) == len(PROBLEMS)
    assert (as_json["n"], as_json["threshold"], as_json["gaps"], as_json["decoder"]) == (5, 0.5, 2, "block")
    assert (as_json["dtype"], as_json["device"], as_json["batch_size"]) == ("float32", "cpu", batch_size)
    assert as_json["step_ms"] > 0


def test_answers_do_not_depend_on_the_batch(student: LanguageModel) -> None:
    alone = evaluate(student, PROBLEMS, batch_size=1, max_new_tokens=8)
    together = evaluate(student, PROBLEMS, batch_size=5, max_new_tokens=8)
    assert [record.text for record in alone.records] == [record.text for record in together.records]


def rule_of(model: LanguageModel, **settings: Any) -> tuple[float | None, int | None, int | None]:
    found = evaluate(model, PROBLEMS[:1], max_new_tokens=4, **settings)
    return found.threshold, found.gaps, found.block_size


def test_the_decoders_default_threshold_gaps_and_blocks_are_reported(student: LanguageModel) -> None:
    network = student.network
    assert rule_of(student) == (0.9, None, network.role.block_size)
    assert rule_of(student, block_size=2) == (0.9, None, 2)
    chosen = LanguageModel(network.with_role(dataclasses.replace(network.role, gaps=2, block_size=8)))
    assert rule_of(chosen) == (0.9, 2, 8)
    assert rule_of(LanguageModel(tiny_network("bidirectional", block_size=2))) == (None, None, 2)
    assert rule_of(LanguageModel(tiny_network("autoregressive"))) == (None, None, None)


def test_ratios_are_of_sums_and_correct_ones_apart() -> None:
    mixed = report("m", True, False)
    fast = dataclasses.replace(mixed.records[0], num_tokens=30, num_forwards=3)
    mixed = dataclasses.replace(mixed, records=[fast, mixed.records[1]])
    assert mixed.tokens_per_forward == 40 / 8
    assert mixed.tokens_per_forward_correct == 10
    assert mixed.to_json()["tokens_per_second"] == 10
    assert report("m", False, False).to_json()["tokens_per_forward_correct"] is None


def test_nothing_to_evaluate_is_an_error(student: LanguageModel) -> None:
    with pytest.raises(FewstepError, match="at least one problem"):
        evaluate(student, [])
    with pytest.raises(FewstepError, match="at least one threshold"):
        sweep(student, PROBLEMS)


def test_sweep_gives_a_list_and_refuses_a_bad_value_at_once(student: LanguageModel) -> None:
    found = sweep(student, PROBLEMS[:2], thresholds=[0.3, 0.9], max_new_tokens=8)
    assert [each.threshold for each in found] == [0.3, 0.9]
    teacher = LanguageModel(tiny_network("bidirectional"))
    assert [each.steps for each in sweep(teacher, PROBLEMS[:2], steps=[2, 4], max_new_tokens=8)] == [2, 4]
    with pytest.raises(FewstepError, match="probability"):
        sweep(student, PROBLEMS, thresholds=[0.9, 1.5], max_new_tokens=8)
    with pytest.raises(FewstepError, match="both swept and set"):
        sweep(student, PROBLEMS, thresholds=[0.9], threshold=0.5)


# --- compare -------------------------------------------------------------------------------


def test_compare_counts_pairs_and_ratios() -> None:
    found = compare(
        report("a", True, True, True, False, tokens=30), report("b", True, False, False, False, tokens=10, forwards=10)
    )
    assert (found.both, found.only_first, found.only_second, found.neither) == (1, 2, 0, 1)
    assert found.difference.estimate == 0.5
    assert found.p_value == 0.5
    assert found.tokens_per_forward_ratio == 6
    assert found.num_forwards_ratio == 0.5
    assert found.seconds_ratio == 1
    assert found.difference_clustered is not None
    json.dumps(found.to_json(), allow_nan=False)
    assert found.sentence().startswith("a solves 75.0% ")
    assert ") contains 0 (McNemar p = 0.5, n = 4)." in found.sentence()


def test_a_difference_whose_interval_leaves_out_0_says_so() -> None:
    found = compare(report("a", *[True] * 50), report("b", *[False] * 50))
    assert ") does not contain 0 (" in found.sentence()


def test_two_settings_of_one_model_are_named_by_what_differs() -> None:
    plain = report("a", True)
    bold = dataclasses.replace(plain, threshold=0.5)
    stepped = dataclasses.replace(plain, threshold=None, steps=32)
    assert compare(plain, bold).names == (f"a (threshold {plain.threshold})", "a (threshold 0.5)")
    few, many = (dataclasses.replace(plain, gaps=gaps) for gaps in (0, 2))
    assert compare(few, many).names == ("a (gaps 0)", "a (gaps 2)")
    small = dataclasses.replace(plain, block_size=16)
    assert compare(plain, small, settings=({}, {"block_size": 16})).names == ("a (block_size 32)", "a (block_size 16)")
    assert compare(bold, stepped).names == ("a (threshold 0.5)", "a (steps 32)")
    assert compare(plain, plain, settings=({}, {"top_k": 4})).names == ("a (default top_k)", "a (top_k 4)")
    assert compare(plain, report("b", True)).names == ("a", "b")
    assert compare(plain, plain).names == ("a", "a")


def test_compare_needs_the_same_problems() -> None:
    with pytest.raises(FewstepError, match="different problems"):
        compare(report("a", True, True), report("b", True))


def test_problems_without_templates_are_not_clustered() -> None:
    own = report("a", True)
    own = dataclasses.replace(own, records=[dataclasses.replace(own.records[0], template=None)])
    assert compare(own, own).difference_clustered is None


# --- timing --------------------------------------------------------------------------------


def test_speed_factors_multiply_to_the_total() -> None:
    published = Timing([10.0, 20.0], [256, 256], [50, 70])
    stopping = Timing([4.0, 11.0], [100, 140], [50, 70])
    fast = Timing([0.2, 0.3], [9, 11], [50, 70])
    factors = speed_factors(published, stopping, fast)
    assert factors.total == pytest.approx(60)
    assert factors.stopping == pytest.approx(2)
    assert factors.fewer_passes == pytest.approx(12)
    assert factors.stopping * factors.fewer_passes * factors.caching == pytest.approx(factors.total)
    assert factors.median_total == pytest.approx(60)


def test_one_disturbed_run_hardly_moves_factors_of_medians() -> None:
    published = Timing([10.0, 11.0, 900.0], [256, 256, 256], [50, 50, 50])
    stopping = Timing([4.0, 5.5, 6.0], [90, 110, 140], [50, 50, 50])
    fast = Timing([0.2, 0.275, 0.1], [9, 11, 10], [50, 50, 50])
    factors = speed_factors(published, stopping, fast, of=statistics.median)
    assert factors.total == factors.median_total == pytest.approx(55)
    assert factors.stopping == pytest.approx(2)
    assert factors.fewer_passes == pytest.approx(11)
    assert factors.stopping * factors.fewer_passes * factors.caching == pytest.approx(factors.total)


def test_contenders_take_turns(student: LanguageModel) -> None:
    asked: list[tuple[str, str]] = []

    def contender(name: str) -> Any:
        def answer(prompt: str) -> Any:
            asked.append((name, prompt))
            return student.generate(prompt, max_new_tokens=4)

        return answer

    timings = time_interleaved({"a": contender("a"), "b": contender("b")}, ["one", "two"])
    assert asked == [("a", "one"), ("b", "one"), ("a", "one"), ("b", "one"), ("b", "two"), ("a", "two")]
    assert timings["a"].to_json()["n"] == 2
    assert timings["a"].step_ms > 0
    with pytest.raises(FewstepError, match="nothing to time"):
        time_interleaved({"a": contender("a")}, [])


def test_the_machine_is_named() -> None:
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["num_threads"] >= 1


def test_figures_are_written_with_their_command_and_machine(tmp_path: Path) -> None:
    write_figures(tmp_path / "new" / "figures.json", {"rows": [1], "machine": {"device": "cpu"}})
    told = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert told["command"].startswith("python ")
    assert (told["rows"], told["machine"]) == ([1], {"device": "cpu"})


# --- plots ---------------------------------------------------------------------------------


def test_plot_writes_both_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = [report("a", True, False, forwards=n).to_json() for n in (2, 5)]
    point = [report("b", True, True).to_json()]
    paths = plot_accuracy({"student": curve, "teacher": point}, tmp_path / "accuracy-v1.0", title="dev")
    assert [path.name for path in paths] == ["accuracy-v1.0.png", "accuracy-v1.0.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths[1].read_text()
    with pytest.raises(FewstepError, match="nothing to plot"):
        plot_accuracy({"student": []}, tmp_path / "empty")
