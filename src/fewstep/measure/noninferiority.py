"""Is the student at most eps worse than its reference? An exact test on problems that both answered.

The loss of a problem is 1 where only the reference is right, -1 where only the student is, otherwise 0; its mean is the
reference's accuracy minus the student's. Problems count as drawn independently from one population. Nothing here is an
approximation for large n: the probability of a wrong certificate is at most the level for every n and every population.

Axes: A = numbers of problems that only the reference solves, B = those that only the student solves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

_Counts = npt.NDArray[Any]

NUISANCE_LEVEL = 1e-5
"""Share of the error that is spent on bounding how often the two disagree."""

_CELLS = 100
_OUTSIDE = 1e-9  # more than the probability of all counts that the sums below leave out
_RESOLUTION = 1e-4  # of a bound: a hundredth of a point
_LEAST = 1e-300  # in place of a probability of 0, whose logarithm is needed


@dataclass(frozen=True)
class Pairs:
    """Of `n` problems, how many only the reference and how many only the student solved. ValueError if impossible."""

    only_reference: int
    only_student: int
    n: int

    def __post_init__(self) -> None:
        fewest = min(self.only_reference, self.only_student)
        if fewest < 0 or self.n < 1 or self.only_reference + self.only_student > self.n:
            raise ValueError(f"these counts are impossible: {self}")

    @property
    def loss(self) -> float:
        """The observed loss."""
        return (self.only_reference - self.only_student) / self.n


def p_value(pairs: Pairs, eps: float) -> float:
    """For the hypothesis that the loss is eps or more, 0 < eps < 1: small where the data speak for a smaller one.

    The exact unconditional test of Hsueh, Liu and Chen (Biometrics 57:478, 2001): outcomes are ordered by the score
    statistic of Nam (Biometrics 53:1422, 1997), and the p-value is the greatest probability, over all populations of
    the hypothesis, of an outcome as favourable to the student as the one observed. How often the two disagree is not
    known; the maximum is taken over its exact confidence interval of level `NUISANCE_LEVEL`, which is added (Berger and
    Boos, JASA 89:1012, 1994).

    With the share of disagreement held fixed, every population of the hypothesis gives a favourable outcome at most as
    often as the one of the same share whose loss is exactly eps. That share runs over an interval, which is cut into
    cells: the probability within a cell is at most that at the fewest losses and the most gains of its ends. So the
    maximum is bounded from above, not searched for.
    """
    if not 0 < eps < 1:
        raise ValueError(f"eps must lie between 0 and 1, got {eps}")
    low, high = _disagreement(pairs, NUISANCE_LEVEL)
    if high < eps:  # a loss of eps takes a disagreement of eps
        return NUISANCE_LEVEL
    ends = np.linspace(max(low, eps), high, _CELLS + 1)
    lost, gained = (ends[:-1] + eps) / 2, np.maximum((ends[1:] - eps) / 2, _LEAST)
    log_ways, lost_BA, gained_BA = _favourable(pairs, eps, _band(pairs.n, lost), _band(pairs.n, gained))
    same_BA = pairs.n - lost_BA - gained_BA
    worst = 0.0
    for more, less in zip(np.log(lost), np.log(gained), strict=True):
        same = math.log(max(_LEAST, 1 - math.exp(more) - math.exp(less)))
        worst = max(worst, float(np.exp(log_ways + lost_BA * more + gained_BA * less + same_BA * same).sum()))
    return min(1.0, worst + _OUTSIDE + NUISANCE_LEVEL)


def upper_bound(pairs: Pairs, confidence: float) -> float:
    """The least eps, in hundredths of a point, that the loss is below with this confidence, which is that of one bound.

    At least one hundredth of a point, also where the student is better. 1.0 if no smaller one can be told.
    """
    refused, certified = max(0, math.floor(pairs.loss / _RESOLUTION)), round(1 / _RESOLUTION)
    while certified - refused > 1:
        middle = (refused + certified) // 2
        if p_value(pairs, middle * _RESOLUTION) <= 1 - confidence:
            certified = middle
        else:
            refused = middle
    return round(certified * _RESOLUTION, 4)


def _favourable(pairs: Pairs, eps: float, lost: _Counts, gained: _Counts) -> tuple[_Counts, _Counts, _Counts]:
    """The outcomes within these counts that are at least as favourable as the observed one: the logarithm of the ways
    in which each comes about (-inf for other outcomes), and its two counts, which broadcast.

    With an outcome every one of fewer losses or more gains is there too, as the bound within a cell needs.
    """
    n = pairs.n
    lost_BA, gained_BA = lost[None, :], gained[:, None]
    observed = _score(np.array(pairs.only_reference), np.array(pairs.only_student), n, eps)
    as_good_BA = (_score(lost_BA, gained_BA, n, eps) <= observed + 1e-12) & (lost_BA + gained_BA <= n)
    most_B = np.maximum.accumulate(np.where(as_good_BA, lost_BA, -1).max(1))
    inside_BA = (lost_BA <= most_B[:, None]) & (lost_BA + gained_BA <= n)
    log_factorial = _log_factorials(n)
    rest_BA = np.maximum(0, n - lost_BA - gained_BA)
    ways_BA = log_factorial[n] - log_factorial[lost_BA] - log_factorial[gained_BA] - log_factorial[rest_BA]
    return np.where(inside_BA, ways_BA, -np.inf), lost_BA, gained_BA


def _score(lost: _Counts, gained: _Counts, n: int, eps: float) -> _Counts:
    """Nam's score statistic: the loss less eps in standard errors, estimated under the hypothesis that it is eps."""
    linear = (lost + gained) * (1 - eps) - 2 * eps * (n - lost)
    gains = (linear + np.sqrt(linear**2 + 8 * n * gained * eps * (1 - eps))) / (4 * n)
    return (lost - gained - n * eps) / np.sqrt(n * (2 * gains + eps - eps * eps))


def _band(n: int, shares: _Counts) -> _Counts:
    """Every count that any of these shares of `n` gives with a probability worth summing (Bernstein's inequality)."""
    few, many = n * float(shares.min()), n * float(shares.max())
    return np.arange(
        max(0, math.floor(few - 8 * math.sqrt(few) - 30)), min(n, math.ceil(many + 8 * math.sqrt(many) + 30)) + 1
    )


def _disagreement(pairs: Pairs, level: float) -> tuple[float, float]:
    """Clopper and Pearson's interval (1934) for the share of problems that one alone solves."""
    n, k = pairs.n, pairs.only_reference + pairs.only_student
    low = 0.0 if k == 0 else _first(lambda share: 1 - _at_most(k - 1, n, share) > level / 2)
    high = 1.0 if k == n else 1 - _first(lambda share: _at_most(k, n, 1 - share) > level / 2)
    return low, high


def _first(condition: Callable[[float], bool]) -> float:
    """The share, rounded down, from which a condition holds that sets in once."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if condition(middle) else (middle, high)
    return low


def _at_most(k: int, n: int, share: float) -> float:
    """Probability of at most k of n."""
    counts, log_factorial = np.arange(k + 1), _log_factorials(n)
    ways = log_factorial[n] - log_factorial[counts] - log_factorial[n - counts]
    return float(np.exp(ways + counts * math.log(share) + (n - counts) * math.log1p(-share)).sum())


@cache
def _log_factorials(n: int) -> _Counts:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
