"""Collapse is called by its name; a healthy run passes."""

import json
import math
from dataclasses import replace

import pytest

from fewstep.decode.health import bleu, measure_diversity, measure_health
from fewstep.errors import FewstepError
from fewstep.train.monitor import CollapseError, CollapseLimits, CollapseMonitor, check_health

SOUND = measure_health([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 4], [3, 3, 5, 9]])


def test_health_near_the_baseline_passes():
    check_health(SOUND, SOUND, CollapseLimits())
    check_health(SOUND, measure_health([[1, 2, 3, 5, 5, 6], [7, 8, 1, 2]]), CollapseLimits())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"empty": 0.3}, r"empty is 0\.3, above the limit 0\.25 \(baseline 0\)"),
        ({"repetition": 0.26}, r"repetition is 0\.26, above the limit 0\.25"),
        ({"longest_run": 17}, r"longest_run is 17, above the limit 16 \(baseline 2\)"),
        ({"entropy": 1.0}, r"entropy is 1, below the limit 1\.0\d+ \(baseline 2\.\d+\)"),
        ({"distinct_2": 0.2}, r"distinct_2 is 0\.2, below the limit 0\.2"),
    ],
)
def test_each_symptom_is_named_with_its_values(change, sentence):
    with pytest.raises(CollapseError, match=sentence):
        check_health(SOUND, replace(SOUND, **change), CollapseLimits())


def test_a_model_that_says_one_thing_has_collapsed():
    with pytest.raises(CollapseError, match="at step 40 the outputs have collapsed: repetition"):
        CollapseMonitor(baseline=SOUND).observe_health(measure_health([[5] * 30] * 3), step=40)


def test_checks_can_be_switched_off_and_wait_for_the_grace():
    silent = measure_health([[], [], []])
    off = dict.fromkeys(("empty_rise", "repetition_rise", "longest_run_factor", "entropy_share", "distinct_share"))
    check_health(SOUND, silent, CollapseLimits(**off))
    monitor = CollapseMonitor(CollapseLimits(grace_steps=100), baseline=SOUND)
    monitor.observe_health(silent, step=99)
    with pytest.raises(CollapseError, match="empty is 1"):
        monitor.observe_health(silent, step=100)


def test_without_a_baseline_the_first_evaluation_is_it():
    monitor = CollapseMonitor()
    monitor.observe_health(SOUND, step=1)
    assert monitor.baseline == SOUND
    with pytest.raises(CollapseError):
        monitor.observe_health(replace(SOUND, empty=1.0), step=2)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_at_once(loss):
    with pytest.raises(CollapseError, match=f"the loss is {loss} at step 7"):
        CollapseMonitor().observe_loss(loss, step=7)


def test_a_loss_that_runs_away_stops_but_a_single_peak_does_not():
    monitor = CollapseMonitor(CollapseLimits(loss_memory=10, loss_factor=3))
    for step in range(20):
        monitor.observe_loss(1.0, step=step)
    monitor.observe_loss(20.0, step=20)  # average 0.9 * 1 + 0.1 * 20 = 2.9
    with pytest.raises(
        CollapseError, match=r"at step 21: its average is 4\.61, more than 3 times the lowest average 1$"
    ):
        monitor.observe_loss(20.0, step=21)


def test_a_resumed_run_judges_the_same():
    limits = CollapseLimits(loss_memory=10)
    whole, first, second = (CollapseMonitor(limits) for _ in range(3))
    first.observe_health(SOUND, step=0)
    whole.observe_health(SOUND, step=0)
    for step in range(15):
        whole.observe_loss(1 + step / 7, step=step)
        first.observe_loss(1 + step / 7, step=step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    whole.observe_loss(2.0, step=15)
    second.observe_loss(2.0, step=15)
    assert second.state_dict() == whole.state_dict()
    assert second.baseline == SOUND


@pytest.mark.parametrize(
    "limits",
    [{"repetition_rise": 0}, {"entropy_share": 1.5}, {"loss_factor": 1.0}, {"loss_memory": 0}, {"grace_steps": -1}],
)
def test_impossible_limits_are_refused(limits):
    with pytest.raises(FewstepError, match=next(iter(limits))):
        CollapseLimits(**limits)


SEEDS = measure_diversity([[[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]], [[5, 4, 3, 2], [9, 8, 7, 6]]])


def test_answers_of_several_seeds_are_told_apart():
    assert SEEDS.distinct_answers == 1
    same = measure_diversity([[[1, 2, 3, 4, 5]] * 4])
    assert (same.distinct_answers, same.self_bleu) == (0.25, 1)
    assert SEEDS.self_bleu < 0.4 < measure_diversity([[[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]]).self_bleu < 1
    with pytest.raises(ValueError, match="at least two answers"):
        measure_diversity([[[1, 2]]])


def test_bleu_of_a_hand_worked_answer():
    # 3 of 4 tokens, 2 of 3 pairs, 1 of 2 triples and 0 of 1 fours are found; all but the first smoothed by one.
    expected = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert math.isclose(bleu([1, 2, 3, 4], [[1, 2, 3, 9]]), expected)
    assert math.isclose(bleu([1, 2, 3], [[1, 2, 3, 4, 5, 6]]), math.exp(1 - 6 / 3))
    assert (bleu([], [[1]]), bleu([], [[]]), bleu([7], [[1]])) == (0, 1, 0)


def test_a_model_that_says_the_same_with_every_seed_has_collapsed():
    monitor = CollapseMonitor()
    monitor.observe_diversity(SEEDS, step=1)
    with pytest.raises(CollapseError, match=r"at step 2 .*distinct_answers is 0\.25, below the limit 0\.5"):
        monitor.observe_diversity(measure_diversity([[[1, 2, 3, 4, 5]] * 4]), step=2)
    nearly = [[1, 2, 3, 4, 5, 6, 7, 8, 9, i] for i in range(10, 14)]
    with pytest.raises(CollapseError, match="self_bleu is"):
        monitor.observe_diversity(measure_diversity([nearly]), step=3)
    resumed = CollapseMonitor()
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert resumed.diversity == SEEDS
