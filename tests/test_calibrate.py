"""Calibration: the exact test of a paired loss, the paths of settings, the recipe that tries many, and the command."""

import importlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fewstep.cli.main import main
from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.measure.calibrate import Measured, Outcome, Rule, calibrate, paths_of
from fewstep.measure.evaluate import Record, Report, evaluate
from fewstep.measure.noninferiority import NUISANCE_LEVEL, Pairs, p_value, upper_bound
from fewstep.models.load import load_network, save_network, weights_hash
from fewstep.models.tiny import tiny_network
from fewstep.tasks.problems import Problem, write_problem_file
from fewstep.train.lora import write_adapter

# --- the exact test ---


def probabilities(n: int, lost: float, gained: float) -> dict[tuple[int, int], float]:
    """Of each outcome of n problems."""
    same = 1 - lost - gained
    return {
        (a, b): math.comb(n, a) * math.comb(n - a, b) * lost**a * gained**b * same ** (n - a - b)
        for a in range(n + 1)
        for b in range(n + 1 - a)
    }


def test_a_loss_of_eps_is_certified_no_more_often_than_the_level_whatever_else_holds() -> None:
    n, eps, level = 16, 0.25, 0.1
    certified = {
        (a, b): p_value(Pairs(a, b, n), eps) <= level for a in range(n + 1) for b in range(n + 1 - a) if a - b < n * eps
    }
    sizes = []
    for disagreement in np.linspace(eps, 0.98, 25):  # at every share of problems that one alone solves
        found = probabilities(n, (disagreement + eps) / 2, (disagreement - eps) / 2)
        sizes.append(sum(probability for outcome, probability in found.items() if certified.get(outcome)))
    assert max(sizes) <= level
    assert max(sizes) > 0.8 * level  # nor is much of the level wasted


def test_without_disagreement_the_p_value_is_that_of_no_loss_in_n_problems() -> None:
    """`0.98**149` is the first power below 5 %."""
    exact = 0.98**149 + NUISANCE_LEVEL
    assert exact <= p_value(Pairs(0, 0, 149), 0.02) <= 1.005 * exact


def test_the_p_value_falls_with_problems_and_with_eps_and_rises_with_the_loss() -> None:
    values = [
        p_value(Pairs(*counts), eps) for *counts, eps in ((8, 4, 200, 0.04), (16, 8, 400, 0.04), (16, 8, 400, 0.05))
    ]
    assert values == sorted(values, reverse=True)
    assert p_value(Pairs(9, 4, 200), 0.04) > values[0] > p_value(Pairs(8, 5, 200), 0.04)
    assert p_value(Pairs(200, 0, 200), 0.04) == 1


def test_the_bound_is_the_least_eps_that_is_certified() -> None:
    pairs = Pairs(9, 4, 300)
    bound = upper_bound(pairs, 0.95)
    assert pairs.loss < bound < 0.05
    assert p_value(pairs, bound) <= 0.05 < p_value(pairs, bound - 1e-4)
    assert upper_bound(Pairs(0, 60, 300), 0.95) == 1e-4
    assert upper_bound(Pairs(2, 0, 2), 0.95) == 1.0


@pytest.mark.parametrize("counts", [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="impossible"):
        Pairs(*counts)


# --- paths of settings ---


def measured(rule: Rule, pairs: Pairs, tokens_per_forward: float = 1.0) -> Measured:
    return Measured(rule=rule, pairs=pairs, accuracy=0.5, tokens_per_forward=tokens_per_forward, seconds=1.0)


def calibrated(losses: dict[float, int], *, gaps: tuple[int | None, ...] = (2,), eps: float = 0.02) -> Outcome:
    """Of 500 problems so many are lost under each threshold; lower thresholds are faster, and so are more gaps."""

    def measure(rule: Rule) -> Measured:
        speed = 10 * (1 - rule.threshold) + (9 if rule.gaps is None else rule.gaps)
        return measured(rule, Pairs(losses[rule.threshold], 0, 500), speed)

    return calibrate(paths_of(list(losses), gaps), measure, eps=eps, confidence=0.95)


def test_the_fastest_certified_setting_is_chosen_and_nothing_behind_a_failure_is_tried() -> None:
    outcome = calibrated({0.5: 0, 0.99: 0, 0.9: 1, 0.8: 30, 0.95: 0})
    assert [trial.measured.rule.threshold for trial in outcome.trials] == [0.99, 0.95, 0.9, 0.8]
    assert [trial.certified for trial in outcome.trials] == [True, True, True, False]
    assert outcome.chosen is not None
    assert outcome.chosen.measured.rule == Rule(threshold=0.9, gaps=2)
    assert outcome.chosen.bound < 0.02


def test_paths_of_several_gaps_share_the_error() -> None:
    outcome = calibrated({0.9: 3, 0.8: 3}, gaps=(0, None))
    alone = calibrated({0.9: 3, 0.8: 3}, gaps=(None,))
    assert [trial.level for trial in alone.trials] == pytest.approx([0.05, 0.05])
    assert [trial.level for trial in outcome.trials] == pytest.approx([0.025] * 4)
    assert outcome.chosen is not None
    assert outcome.chosen.measured.rule == Rule(threshold=0.8, gaps=None)


def test_no_setting_is_chosen_where_none_is_certified() -> None:
    outcome = calibrated({0.9: 8, 0.8: 9})
    assert outcome.chosen is None
    assert outcome.closest.measured.rule.threshold == 0.9


@pytest.mark.parametrize(
    ("thresholds", "eps", "named"), [([], 0.1, "thresholds"), ([0.9, 0.9], 0.1, "thresholds"), ([0.9], 1.0, "eps")]
)
def test_what_cannot_be_calibrated_is_refused(thresholds: list[float], eps: float, named: str) -> None:
    with pytest.raises(FewstepError, match=f"^{named} must"):
        calibrate(paths_of(thresholds, [2]), lambda rule: measured(rule, Pairs(0, 0, 9)), eps=eps, confidence=0.95)


@pytest.mark.parametrize("shared", [0.0, 0.8, 1.0])
def test_few_of_many_calibrations_choose_a_setting_whose_loss_is_eps_or_more(
    shared: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least favourable case: behind a careful setting, true losses of exactly eps in every one.

    The settings' outcomes on a problem are the same with probability `shared`, and otherwise drawn apart.
    """
    remembered = cache(lambda pairs, eps: p_value(pairs, eps))
    monkeypatch.setattr("fewstep.measure.calibrate.p_value", remembered)
    n, eps, confidence, gained, repeats = 60, 0.1, 0.9, 0.02, 1_000
    losses = {0.9: 0.02, 0.8: eps, 0.7: eps}
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(repeats):
        common = generator.random(n)

        def measure(rule: Rule, common: Any = common) -> Measured:
            drawn = np.where(generator.random(n) < shared, common, generator.random(n))
            lost = (drawn > 1 - gained - losses[rule.threshold]).sum()
            return measured(rule, Pairs(int(lost), int((drawn < gained).sum()), n), 1 / rule.threshold)

        chosen = calibrate(paths_of(list(losses), [2]), measure, eps=eps, confidence=confidence).chosen
        wrong += chosen is not None and losses[chosen.measured.rule.threshold] >= eps
    assert wrong / repeats <= 1 - confidence + 3 * math.sqrt(confidence * (1 - confidence) / repeats)


# --- the recipe ---


def test_the_recipe_judges_calibrations_from_one_table_of_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = importlib.import_module("calibrate")
    for name in ("student", "reference"):
        save_network(tiny_network("block_causal"), tmp_path / name)
    problems = [Problem(f"p{index}", "1 + 1?", "2") for index in range(350)]
    write_problem_file(tmp_path / "results" / "problems.jsonl", problems)
    asked = []

    def evaluated(model: Any, part: list[Problem], *, batch_size: int, **settings: Any) -> Report:
        """The student loses every tenth problem at 0.5, and solves all at 0.9."""
        asked.append((settings.get("threshold"), len(part)))
        records = [
            Record(
                id=problem.id, template=None, answer="2", text="2", num_tokens=8, num_forwards=4, seconds=0.1,
                finish_reason="stop", correct=settings.get("threshold") != 0.5 or int(problem.id[1:]) % 10 > 0,
            )
            for problem in part
        ]  # fmt: skip
        shared = {
            "gaps": None,
            "threshold": None,
            "block_size": 4,
            "steps": None,
            "batch_size": 1,
            "dtype": "",
            "device": "",
        }
        return Report(
            model="m", role="", decoder="", engine="", task="", records=records, wall_seconds=1.0, step_ms=1.0, **shared
        )

    monkeypatch.setattr("fewstep.measure.contenders.evaluate", evaluated)
    for _ in range(2):
        recipe.main(
            tmp_path / "results", str(tmp_path / "student"), str(tmp_path / "reference"), threshold=[0.5, 0.9], gaps=2,
            eps=[0.05], confidence=0.9, calibrations=2, n=100, fresh=150, shard=200, time_limit=None,
        )  # fmt: skip
    assert sorted(asked, key=str) == [(0.5, 150), (0.5, 200), (0.9, 150), (0.9, 200), (None, 150), (None, 200)]
    told = json.loads((tmp_path / "results" / "calibrate.json").read_text())
    assert told["judged"][0]["chosen"] == [{"threshold": 0.9, "gaps": 2, "loss": 0.0}] * 2
    assert "eps 0.05: 2 of 2 calibrations found a setting, 2 of these lose at most eps" in capsys.readouterr().out


# --- the command ---


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Random networks, of which the student and the reference answer nothing right, and 24 problems."""
    network = tiny_network("block_causal", head_scale=30.0)
    for name, saved in (("student", network), ("causal", tiny_network("autoregressive"))):
        save_network(saved, tmp_path / name)
    rows = [{"id": index, "question": "1 + 1?", "answer": "2"} for index in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: tmp_path / name for name in ("student", "causal", "data.jsonl", "copy", "report.json")}


@pytest.fixture
def command(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, dict[str, Any] | None]]:
    """Run `fewstep calibrate`; its exit code, what it said on standard error, and the report."""

    def run(*options: object) -> tuple[int, str, dict[str, Any] | None]:
        shared = {
            "--model": folders["student"], "--reference": folders["causal"], "--data": folders["data.jsonl"],
            "--eps": 0.3, "--confidence": 0.9, "--max-new-tokens": 8, "--batch-size": 24,
            "--json": folders["report.json"],
        }  # fmt: skip
        given = {**shared, **dict(zip(options[::2], options[1::2], strict=True))}
        flags = [name for name, value in given.items() if value is True]
        values = [str(part) for name, value in given.items() if value is not True for part in (name, value)]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["calibrate", *values, *flags])
        said = capsys.readouterr().err.splitlines()[-1]
        report = folders["report.json"]
        return int(stopped.value.code or 0), said, json.loads(report.read_text()) if report.exists() else None

    return run


def solved_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """From now on causal networks solve everything; returns the thresholds of all evaluations, as they come."""
    asked: list[float | None] = []

    def evaluated(model: LanguageModel, *arguments: Any, **settings: Any) -> Report:
        report = evaluate(model, *arguments, **settings)
        asked.append(report.threshold)
        right = model.role.name == "autoregressive"
        return replace(report, records=[replace(record, correct=right) for record in report.records])

    monkeypatch.setattr("fewstep.measure.evaluate.evaluate", evaluated)
    return asked


def test_a_calibrated_copy_says_what_it_promises_and_eval_repeats_it(
    folders: dict[str, Path], command: Any, tmp_path: Path
) -> None:
    before = (folders["student"] / "config.json").read_bytes()
    code, said, report = command("--thresholds", "0.6,0.9", "--gaps", "1,any", "--output", folders["copy"])
    assert code == 0
    assert report is not None
    assert [(trial["threshold"], trial["gaps"]) for trial in report["trials"]] == [
        (0.9, 1),
        (0.6, 1),
        (0.9, None),
        (0.6, None),
    ]
    assert all(trial["certified"] and trial["loss"] == 0 for trial in report["trials"])
    assert "is calibrated on 24 problems of data: with threshold 0." in said
    assert "less than 30 points below that of" in said
    assert (folders["student"] / "config.json").read_bytes() == before
    assert not list(tmp_path.glob("*.kept"))

    lm = load(folders["copy"])
    promise = lm.network.calibration
    assert promise is not None
    assert (promise.eps, promise.confidence, promise.n, promise.reference) == (0.3, 0.9, 24, str(folders["causal"]))
    assert promise.threshold == report["chosen"]["threshold"] == lm.role.threshold
    assert promise.reference_weights == weights_hash(load_network(folders["causal"]))
    assert promise.weights == weights_hash(load_network(folders["student"])) == weights_hash(lm.network)
    problems = [Problem("one", "1 + 1?", "2")]
    shared: dict[str, Any] = {"max_new_tokens": 8, "warm_up": False}
    assert evaluate(lm, problems, **shared).to_json()["calibration"] == vars(promise)
    for other in ({"max_new_tokens": 4}, {"threshold": 0.123}, {"temperature": 1.0}):
        assert "calibration" not in evaluate(lm, problems, **{**shared, **other}).to_json()
    with torch.no_grad():
        next(lm.network.module.parameters()).mul_(2)  # other weights
    assert "calibration" not in evaluate(LanguageModel(lm.network), problems, **shared).to_json()


def test_a_promise_is_not_saved_with_other_weights_nor_kept_for_another_threshold(
    folders: dict[str, Path], command: Any, tmp_path: Path
) -> None:
    assert command("--thresholds", 0.7, "--in-place", True)[0] == 0
    network = load_network(folders["student"])
    assert network.calibration is not None
    assert load_network(folders["student"], block_size=8).calibration is None
    save_network(network, tmp_path / "trained")
    assert load_network(tmp_path / "trained").calibration is None
    assert load_network(tmp_path / "trained").role.threshold == 0.7
    config = folders["student"] / "config.json"
    stored = json.loads(config.read_text())
    config.write_text(json.dumps({**stored, "threshold": 0.8}))
    assert load_network(folders["student"]).calibration is None
    for damaged in ({"eps": 0.1}, "yes", {**stored["calibration"], "eps": 2}):
        config.write_text(json.dumps({**stored, "calibration": damaged}))
        with pytest.raises(FewstepError, match=r"config\.json: .*calibration"):
            load_network(folders["student"])


def test_a_calibrated_copy_of_an_adapter_finds_its_base_and_gives_the_same_tokens(
    folders: dict[str, Path], command: Any, tmp_path: Path
) -> None:
    adapter = tmp_path / "deep" / "adapter"
    network = load_network(folders["student"])
    model = get_peft_model(network.module, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert isinstance(model, PeftModel)
    write_adapter(model, model.state_dict(), adapter, base="../../student")  # no config.json: that of the base
    code, _, _ = command("--model", adapter, "--thresholds", 0.7, "--output", folders["copy"])
    assert code == 0
    assert json.loads((folders["copy"] / "adapter_config.json").read_text())["base_model_name_or_path"] == "../student"
    first, second = load(adapter), load(folders["copy"])
    assert second.network.calibration is not None
    assert first.network.calibration is None
    assert second.role.threshold == 0.7
    settings: dict[str, Any] = {"max_new_tokens": 8, "threshold": 0.7}
    assert first.generate("1 + 1?", **settings).token_ids == second.generate("1 + 1?", **settings).token_ids


def test_where_no_setting_reaches_eps_it_says_which_came_closest_and_writes_no_model(
    folders: dict[str, Path], command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = solved_by_the_reference(monkeypatch)
    code, said, report = command("--thresholds", "0.6,0.9", "--output", folders["copy"])
    assert code == 2
    assert said.startswith("fewstep: no setting keeps the accuracy less than 30 points below that of")
    assert "the closest, threshold 0.9, any number of gaps, is 100.00 points below on these 24 problems" in said
    assert re.search(r"24 problems, and less than \d+\.\d\d points with [\d.]+ % confidence; give more problems", said)
    assert asked == [None, 0.9]  # nothing behind the first failure
    assert not folders["copy"].exists()
    assert report is not None
    assert report["chosen"] is None
    assert not list(tmp_path.glob("*.kept"))


def test_an_interrupted_calibration_goes_on_with_the_answers_it_has(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def interrupted(model: LanguageModel, *arguments: Any, **settings: Any) -> Report:
        if asked:
            raise KeyboardInterrupt
        asked.append(evaluate(model, *arguments, **settings))
        return asked[0]

    monkeypatch.setattr("fewstep.measure.evaluate.evaluate", interrupted)
    code, said, _ = command("--thresholds", 0.7)
    assert (code, "answers kept" in said) == (130, True)
    monkeypatch.setattr("fewstep.measure.evaluate.evaluate", evaluate)
    monkeypatch.setattr(LanguageModel, "generate", refusing_causal(LanguageModel.generate))
    assert command("--thresholds", 0.7)[0] == 0


def refusing_causal(generate: Any) -> Any:
    def generated(self: LanguageModel, prompts: Any, **settings: Any) -> Any:
        assert self.role.name != "autoregressive", "the reference's answers are there"
        return generate(self, prompts, **settings)

    return generated


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--eps", 0.01), "24 problems are too few to show a loss below 0.01"),
        (("--eps", 1e-9), "--eps must"),
        (("--confidence", 0.9999), "--confidence must"),
        (
            ("--gaps", "0,1,2,3,any", "--confidence", 0.999),
            "24 problems are too few to show a loss below 0.3 at the error",
        ),
        (("--thresholds", "0.9,1.5"), "the threshold is a probability"),
        (("--thresholds", "0.9,a"), "--thresholds is a list of numbers"),
        (("--gaps", "2,all"), "--gaps is a list of numbers"),
        (("--gaps", "-1"), "--gaps must be at least 0"),
        (("--thresholds", "0.9,0.9"), "--thresholds must be one or more different numbers"),
        (("--model", "gsm-student", "--in-place", True), "gsm-student is no folder of your own"),
        (("--overwrite", True), "--overwrite has no effect without --output"),
        (("--output", "new", "--in-place", True), "--output writes a copy and --in-place changes the model itself"),
    ],
)
def test_bad_input_is_one_sentence(command: Any, options: tuple[object, ...], sentence: str) -> None:
    code, said, report = command(*options)
    assert code == 2
    assert said.startswith(f"fewstep: {sentence}")
    assert report is None


def test_only_a_block_causal_student_is_calibrated_and_no_folder_is_replaced_unasked(
    folders: dict[str, Path], command: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    code, said, _ = command("--model", folders["causal"])
    assert (code, "has the role autoregressive" in said) == (2, True)
    code, said, _ = command("--output", folders["causal"])
    assert (code, "is what --reference reads" in said) == (2, True)
    code, said, _ = command("--output", tmp_path / "file")
    assert (code, "is a file, not a folder" in said) == (2, True)
    folders["copy"].mkdir()
    (folders["copy"] / "mine").touch()
    code, said, _ = command("--output", folders["copy"])
    assert (code, "is not empty" in said) == (2, True)
