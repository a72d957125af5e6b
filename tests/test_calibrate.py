"""Calibration: the exact test of a paired loss, the paths of settings, and the recipe that tries many calibrations."""

import importlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.errors import FewstepError
from fewstep.measure.calibrate import Measured, Outcome, Rule, calibrate, paths_of
from fewstep.measure.evaluate import Record, Report
from fewstep.measure.noninferiority import NUISANCE_LEVEL, Pairs, p_value, upper_bound
from fewstep.models.load import save_network
from fewstep.models.tiny import tiny_network
from fewstep.tasks.problems import Problem, write_problem_file

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

    monkeypatch.setattr(recipe, "evaluate", evaluated)
    for _ in range(2):
        recipe.main(
            tmp_path / "results", str(tmp_path / "student"), str(tmp_path / "reference"), threshold=[0.5, 0.9], gaps=2,
            eps=[0.05], confidence=0.9, calibrations=2, n=100, fresh=150, shard=200, time_limit=None,
        )  # fmt: skip
    assert sorted(asked, key=str) == [(0.5, 150), (0.5, 200), (0.9, 150), (0.9, 200), (None, 150), (None, 200)]
    told = json.loads((tmp_path / "results" / "calibrate.json").read_text())
    assert told["judged"][0]["chosen"] == [{"threshold": 0.9, "gaps": 2, "loss": 0.0}] * 2
    assert "eps 0.05: 2 of 2 calibrations found a setting, 2 of these lose at most eps" in capsys.readouterr().out
