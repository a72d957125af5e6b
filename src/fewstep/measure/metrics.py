"""Statistics of right and wrong: intervals for one share, and paired comparisons on the same items.

Axes: S = seeds, I = items.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from fewstep.tasks.text_metrics import chrf_counts, chrf_of

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float

    def in_percent(self, *, signed: bool = False) -> str:
        """As tables have it: `93.1 (92.0 to 94.1)`."""
        sign = "+" if signed else ""
        return f"{100 * self.estimate:{sign}.1f} ({100 * self.low:{sign}.1f} to {100 * self.high:{sign}.1f})"


def wilson_interval(num_right: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """The share `num_right` / `n` with Wilson's score interval (1927); for n = 0 the share is NaN and the interval is
    [0, 1].

    ValueError if `num_right` is not between 0 and `n`.
    """
    if not 0 <= num_right <= n:
        raise ValueError(f"num_right must lie between 0 and n, got {num_right} of {n}")
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    z = normal_quantile(confidence)
    share = num_right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the ends are exact; rounding would leave 1e-17.
    return Interval(share, 0.0 if num_right == 0 else centre - half, 1.0 if num_right == n else centre + half)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test: the numbers of items that only the first, or only the second, answers
    right.

    Under the hypothesis of equal accuracy each such item is a fair coin. 1.0 if there are none.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts cannot be negative, got {only_first} and {only_second}")
    discordant = only_first + only_second
    fewer = min(only_first, only_second)
    log_terms = [_log_choose(discordant, k) - discordant * math.log(2) for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in log_terms))


def paired_interval(first: Sequence[bool], second: Sequence[bool], confidence: float = CONFIDENCE) -> Interval:
    """Accuracy of `first` minus accuracy of `second` on the same items, which are assumed to be independent.

    The estimate is the plain difference; the interval is Wald's after adding one item to each discordant cell
    (Bonett and Price 2012), so it keeps a width when the two never differ. ValueError for other lengths or none.
    """
    n = _check_pairs(first, second)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    more, less = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = normal_quantile(confidence) * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    return Interval((only_first - only_second) / n, max(-1.0, more - less - half), min(1.0, more - less + half))


def clustered_paired_interval(
    first: Sequence[bool], second: Sequence[bool], clusters: Sequence[Hashable], confidence: float = CONFIDENCE
) -> Interval:
    """The same difference when items of one cluster (a template) are correlated.

    Cluster-robust variance of the mean difference with the factor G / (G - 1), and Student's t with G - 1 degrees of
    freedom for G clusters (Miller 2024, arXiv 2411.00640). A single cluster gives no information: -1 to 1.
    """
    n = _check_pairs(first, second)
    if len(clusters) != n:
        raise ValueError(f"there are {n} items and {len(clusters)} cluster labels; give one for each item")
    differences = [int(a) - int(b) for a, b in zip(first, second, strict=True)]
    mean = sum(differences) / n
    sums: dict[Hashable, float] = defaultdict(float)
    for difference, cluster in zip(differences, clusters, strict=True):
        sums[cluster] += difference - mean
    num_clusters = len(sums)
    if num_clusters == 1:
        return Interval(mean, -1.0, 1.0)
    variance = num_clusters / (num_clusters - 1) * math.fsum(value * value for value in sums.values()) / n**2
    half = student_quantile(num_clusters - 1, confidence) * math.sqrt(variance)
    return Interval(mean, max(-1.0, mean - half), min(1.0, mean + half))


def normal_quantile(confidence: float) -> float:
    """z with `confidence` of the standard normal between -z and z. ValueError unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}; try 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def student_quantile(degrees: int, confidence: float) -> float:
    """t with `confidence` of Student's distribution between -t and t.

    Exact for 1 and 2 degrees of freedom, otherwise the expansion 26.7.5 of Abramowitz and Stegun (error below 1 % at 3
    degrees and 95 %, below 1e-4 from 10 on).
    """
    z = normal_quantile(confidence)
    if degrees == 1:
        return math.tan(math.pi * confidence / 2)
    if degrees == 2:
        return confidence * math.sqrt(2 / (1 - confidence * confidence))
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(degrees) ** power for power, term in enumerate(terms, start=1))


def _check_pairs(first: Sequence[bool], second: Sequence[bool]) -> int:
    if len(first) != len(second) or not first:
        raise ValueError(f"a paired comparison needs the same items twice, got {len(first)} and {len(second)}")
    return len(first)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def crossed_interval(values_SI: np.ndarray, clusters: Sequence[int]) -> Interval:
    """The mean over seeds and problems with a 95 % interval for other seeds and other problems.

    Two variances are added: of the problems' means over the seeds, clustered (as `clustered_paired_interval`), and of
    the seeds' means. Student's t with the degrees of freedom of Welch and Satterthwaite. The interval is a little too
    wide, since the interaction of seed and problem counts in both. Values may be differences.
    """
    num_seeds, num_items = values_SI.shape
    mean = float(values_SI.mean())
    sums: dict[int, float] = defaultdict(float)
    for value, cluster in zip(values_SI.mean(0) - mean, clusters, strict=True):
        sums[cluster] += float(value)
    num_clusters = len(sums)
    if num_clusters < 2:
        return Interval(mean, -1.0, 1.0)
    of_items = num_clusters / (num_clusters - 1) * sum(value**2 for value in sums.values()) / num_items**2
    of_seeds = float(values_SI.mean(1).var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    if of_items + of_seeds == 0:
        return Interval(mean, mean, mean)
    inverse_degrees = of_items**2 / (num_clusters - 1) + (of_seeds**2 / (num_seeds - 1) if num_seeds > 1 else 0.0)
    degrees = max(1, int((of_items + of_seeds) ** 2 / inverse_degrees))
    half = student_quantile(degrees, CONFIDENCE) * math.sqrt(of_items + of_seeds)
    return Interval(mean, mean - half, mean + half)


NUM_RESAMPLES = 1_000


def chrf_interval(texts: Sequence[str], references: Sequence[str], confidence: float = CONFIDENCE) -> Interval:
    """chrF of all texts together, 0 to 100, with its percentile interval over NUM_RESAMPLES resamples of the pairs.

    The resamples are the same in every call, so the figure is a function of the texts. ValueError as `chrf`.
    """
    counts = chrf_counts(texts, references)
    rng = np.random.default_rng(0)
    # How often each pair is drawn: summing counts by these weights is the same as summing over the drawn pairs.
    drawn = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=NUM_RESAMPLES)
    resampled = [chrf_of(sums) for sums in np.einsum("rp,pnc->rnc", drawn, counts)]
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(chrf_of(counts.sum(0)), float(low), float(high))
