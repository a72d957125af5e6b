"""A against B on the same problems: paired accuracy, tokens per forward and time."""

from dataclasses import dataclass
from typing import Any

from fewstep.errors import FewstepError
from fewstep.measure.evaluate import Report
from fewstep.measure.metrics import Interval, clustered_paired_interval, mcnemar_exact, paired_interval, wilson_interval


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The first report against the second; differences are first - second, ratios first / second.

    `difference_clustered` treats the problems of one template as one cluster; it is None if the problems name no
    templates. `p_value` is McNemar's exact test. `seconds_ratio` compares the medians and means something only if both
    reports come from one run on the same machine, at the same batch size.
    """

    first: Report
    second: Report
    only_first: int
    only_second: int
    both: int
    neither: int
    difference: Interval
    difference_clustered: Interval | None
    p_value: float
    tokens_per_forward_ratio: float
    num_forwards_ratio: float
    seconds_ratio: float

    def to_json(self) -> dict[str, Any]:
        clustered = self.difference_clustered
        return {
            "first": self.first.to_json(),
            "second": self.second.to_json(),
            "n": self.first.n,
            "both": self.both,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "neither": self.neither,
            "difference": self.difference.estimate,
            "difference_ci95": [self.difference.low, self.difference.high],
            "difference_ci95_clustered": None if clustered is None else [clustered.low, clustered.high],
            "mcnemar_p": self.p_value,
            "tokens_per_forward_ratio": self.tokens_per_forward_ratio,
            "num_forwards_ratio": self.num_forwards_ratio,
            "seconds_ratio": self.seconds_ratio,
        }

    def sentence(self) -> str:
        """The result in words, saying whether the difference exceeds its interval."""
        points = [100 * value for value in (self.difference.estimate, self.difference.low, self.difference.high)]
        beyond = "exceeds its interval" if points[1] > 0 or points[2] < 0 else "is within its interval"
        return (
            f"{self.first.model} solves {_share(self.first)}, {self.second.model} {_share(self.second)}; "
            f"the difference of {points[0]:+.1f} points ({points[1]:+.1f} to {points[2]:+.1f}) {beyond} "
            f"(McNemar p = {self.p_value:.2g}, n = {self.first.n})."
        )


def compare(first: Report, second: Report) -> Comparison:
    """Compare two evaluations. FewstepError unless they answered the same problems in the same order."""
    if [(record.id, record.answer) for record in first.records] != [
        (record.id, record.answer) for record in second.records
    ]:
        raise FewstepError("the two reports are of different problems; evaluate both on the same ones")
    right_first = [record.correct for record in first.records]
    right_second = [record.correct for record in second.records]
    pairs = list(zip(right_first, right_second, strict=True))
    templates = [record.template for record in first.records]
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    return Comparison(
        first=first,
        second=second,
        only_first=only_first,
        only_second=only_second,
        both=pairs.count((True, True)),
        neither=pairs.count((False, False)),
        difference=paired_interval(right_first, right_second),
        difference_clustered=(
            None if None in templates else clustered_paired_interval(right_first, right_second, templates)
        ),
        p_value=mcnemar_exact(only_first, only_second),
        tokens_per_forward_ratio=first.tokens_per_forward / second.tokens_per_forward,
        num_forwards_ratio=_num_forwards(first) / _num_forwards(second),
        seconds_ratio=first.to_json()["seconds_median"] / second.to_json()["seconds_median"],
    )


def _num_forwards(report: Report) -> int:
    return sum(record.num_forwards for record in report.records)


def _share(report: Report) -> str:
    interval = wilson_interval(report.num_correct, report.n)
    return f"{interval.estimate:.1%} ({interval.low:.1%} to {interval.high:.1%})"
