"""Intervals and tests against hand-worked and published numbers."""

import math

import numpy as np
import pytest

from fewstep.measure.metrics import (
    chrf_interval,
    clustered_paired_interval,
    crossed_interval,
    mcnemar_exact,
    paired_interval,
    student_quantile,
    wilson_interval,
)
from fewstep.measure.seeds import Setting, at_speed
from fewstep.tasks.text_metrics import chrf


def test_wilson_known_values() -> None:
    interval = wilson_interval(81, 263)  # Newcombe 1998, table I
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    interval = wilson_interval(15, 148)
    assert (interval.low, interval.high) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_wilson_at_none_all_and_nothing() -> None:
    none, every = wilson_interval(0, 20), wilson_interval(20, 20)
    assert none.low == 0
    assert none.high == pytest.approx(0.1611, abs=5e-5)
    assert every.high == 1
    assert every.low == pytest.approx(1 - 0.1611, abs=5e-5)
    nothing = wilson_interval(0, 0)
    assert math.isnan(nothing.estimate)
    assert (nothing.low, nothing.high) == (0, 1)


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson_interval(5, 4)


def test_mcnemar_known_values() -> None:
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar_exact(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_exact(8, 2) == mcnemar_exact(2, 8)
    assert mcnemar_exact(3, 3) == 1
    assert mcnemar_exact(0, 0) == 1
    assert 0 < mcnemar_exact(4000, 5000) < 1e-20  # no overflow
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)


def test_paired_interval_by_hand() -> None:
    first, second = [True] * 8 + [False] * 2, [True] * 5 + [False] * 4 + [True]
    # only first: 3, only second: 1; p12 = 4/12, p21 = 2/12; variance (1/2 - 1/36) / 12
    half = 1.959964 * math.sqrt((1 / 2 - 1 / 36) / 12)
    interval = paired_interval(first, second)
    assert interval.estimate == pytest.approx(0.2)
    assert (interval.low, interval.high) == pytest.approx((1 / 6 - half, 1 / 6 + half), abs=1e-6)


def test_paired_interval_keeps_a_width_when_nothing_differs() -> None:
    interval = paired_interval([True] * 10, [True] * 10)
    assert interval.estimate == 0
    assert interval.low < 0 < interval.high
    assert paired_interval([True], [False]).high <= 1


def test_paired_comparisons_need_the_same_items() -> None:
    with pytest.raises(ValueError, match="same items"):
        paired_interval([True], [True, False])
    with pytest.raises(ValueError, match="same items"):
        paired_interval([], [])
    with pytest.raises(ValueError, match="one for each"):
        clustered_paired_interval([True, True], [True, True], ["a"])


def test_clustered_interval_by_hand() -> None:
    first = [True, True, True, True, False, False]
    second = [False, False, True, True, False, False]
    # mean difference 1/3; cluster sums of (d - 1/3): a 4/3, b -2/3, c -2/3; G/(G-1) = 3/2; t(2) = 4.302653
    variance = 1.5 * (16 / 9 + 4 / 9 + 4 / 9) / 36
    half = 4.302653 * math.sqrt(variance)
    interval = clustered_paired_interval(first, second, ["a", "a", "b", "b", "c", "c"])
    assert interval.estimate == pytest.approx(1 / 3)
    assert interval.low == pytest.approx(max(-1, 1 / 3 - half), abs=1e-6)
    assert interval.high == pytest.approx(min(1, 1 / 3 + half), abs=1e-6)
    assert clustered_paired_interval([True, False], [False, False], ["a", "a"]).low == -1


def test_clusters_that_move_together_widen_the_interval() -> None:
    first = [cluster % 2 == 0 for cluster in range(20) for _ in range(50)]
    second = [cluster % 2 == 1 for cluster in range(20) for _ in range(50)]
    clusters = [cluster for cluster in range(20) for _ in range(50)]
    plain, clustered = paired_interval(first, second), clustered_paired_interval(first, second, clusters)
    assert clustered.high - clustered.low > 5 * (plain.high - plain.low)


@pytest.mark.parametrize(
    ("degrees", "quantile", "error"),
    [(1, 12.7062, 1e-4), (2, 4.3027, 1e-4), (3, 3.1824, 0.03), (10, 2.2281, 1e-3), (74, 1.9925, 1e-4)],
)
def test_student_quantiles(degrees: int, quantile: float, error: float) -> None:
    assert student_quantile(degrees, 0.95) == pytest.approx(quantile, abs=error)


def test_an_interval_over_seeds_and_problems_adds_both_variances() -> None:
    same_seeds = np.array([[1, 0, 1, 0], [1, 0, 1, 0]])
    clusters = [0, 1, 2, 3]
    interval = crossed_interval(same_seeds, clusters)
    standard_error = math.sqrt(4 / 3 * 4 * 0.25 / 16)
    assert interval.high - interval.estimate == pytest.approx(3.182 * standard_error, rel=0.01)  # t with 3 degrees
    seeds_only = crossed_interval(np.array([[1, 1], [0, 0]]), [0, 1])
    assert seeds_only.high - seeds_only.estimate == pytest.approx(12.706 * math.sqrt(0.5 / 2), rel=0.01)  # 1 degree
    assert crossed_interval(np.full((2, 3), 1), [0, 1, 2]).low == 1


def test_accuracy_at_a_speed_is_interpolated_for_each_seed() -> None:
    def setting(speeds: list[float], marks: list[list[int]]) -> Setting:
        return Setting(np.array(speeds), np.array(speeds), np.array(marks))

    settings = {0.8: setting([4.0, 4.0], [[0, 0], [0, 1]]), 0.9: setting([2.0, 2.5], [[1, 0], [1, 1]])}
    found = at_speed(settings, 3.0)
    assert found[0].tolist() == [0.5, 0.0]
    assert found[1] == pytest.approx([2 / 3, 1.0])
    assert at_speed(settings, 2.2) is None


def test_the_interval_of_chrf_holds_it_and_shrinks_with_more_texts() -> None:
    texts, references = ["abcd", "abce", "xbcd", "abcd"], ["abcd"] * 4
    few, many = chrf_interval(texts, references), chrf_interval(texts * 25, references * 25)
    assert few.estimate == pytest.approx(chrf(texts, references)) == pytest.approx(many.estimate)
    assert few.low <= many.low < many.estimate < many.high <= few.high
    assert chrf_interval(texts, references) == few
    right = chrf_interval(references, references)
    assert (right.low, right.high) == (pytest.approx(100), pytest.approx(100))
