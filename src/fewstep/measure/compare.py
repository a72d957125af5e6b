"""A against B on the same problems: paired accuracy, tokens per forward and time."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from fewstep.errors import FewstepError
from fewstep.measure.evaluate import Report
from fewstep.measure.metrics import Interval, clustered_paired_interval, mcnemar_exact, paired_interval, wilson_interval


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The first report against the second; differences are first - second, ratios first / second.

    `names` names the two: the models, and what differs if they are the same model. `difference_clustered` treats the
    problems of one template as one cluster; it is None if the problems name no templates. `p_value` is McNemar's exact
    test. `seconds_ratio` compares the medians and means something only if both reports come from one run on the same
    machine, at the same batch size.
    """

    first: Report
    second: Report
    names: tuple[str, str]
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
            "names": list(self.names),
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
        """The result in words, saying whether the interval of the difference contains 0."""
        points = [100 * value for value in (self.difference.estimate, self.difference.low, self.difference.high)]
        contains = "contains 0" if points[1] <= 0 <= points[2] else "does not contain 0"
        return (
            f"{self.names[0]} solves {_share(self.first)}, {self.names[1]} {_share(self.second)}; "
            f"the difference is {points[0]:+.1f} points, and its 95 % interval ({points[1]:+.1f} to {points[2]:+.1f}) "
            f"{contains} (McNemar p = {self.p_value:.2g}, n = {self.first.n})."
        )


def compare(
    first: Report,
    second: Report,
    *,
    settings: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
) -> Comparison:
    """Compare two evaluations; `settings` name them if one model was evaluated with two settings.

    FewstepError unless they answered the same problems in the same order.
    """
    check_same_problems(first, second)
    right_first = [record.correct for record in first.records]
    right_second = [record.correct for record in second.records]
    pairs = list(zip(right_first, right_second, strict=True))
    templates = [record.template for record in first.records]
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    return Comparison(
        first=first,
        second=second,
        names=_names((first, second), settings),
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


def comparison_sentence(row: Mapping[str, Any]) -> str:
    """In words what `Comparison.to_json` says, with names in place of `first` and `second`: the difference with its
    interval, by template where templates are known, and McNemar's test.
    """
    low, high = row["difference_ci95_clustered"] or row["difference_ci95"]
    kind = "clustered by template" if row["difference_ci95_clustered"] else "by problem"
    contains = "contains 0" if low <= 0 <= high else "does not contain 0"
    side = "above" if row["difference"] > 0 else "below"
    return (
        f"{row['first']} scores {100 * abs(row['difference']):.2f} points {side} {row['second']} on {row['n']:,} "
        f"problems; the interval of the difference ({100 * low:+.2f} to {100 * high:+.2f}, paired, {kind}) {contains}; "
        f"McNemar p = {row['mcnemar_p']:.2g}; tokens per forward {row['tokens_per_forward_ratio']:.2f} to 1."
    )


def check_same_problems(first: Report, second: Report) -> None:
    """FewstepError unless both answered the same problems in the same order."""
    asked, other = ([(record.id, record.answer) for record in report.records] for report in (first, second))
    if asked != other:
        raise FewstepError("the two reports are of different problems; evaluate both on the same ones")


def compare_shared(first: Report, second: Report) -> Comparison | None:
    """Compare two evaluations on the problems that both have answered; None if there are none."""
    shared = {record.id for record in first.records} & {record.id for record in second.records}
    return compare(_among(first, shared), _among(second, shared)) if shared else None


def _among(report: Report, ids: Set[str]) -> Report:
    records = [record for record in report.records if record.id in ids]
    return replace(report, records=records, wall_seconds=report.wall_seconds * len(records) / report.n)


def _names(reports: tuple[Report, Report], settings: tuple[Mapping[str, Any], Mapping[str, Any]]) -> tuple[str, str]:
    """The names of the models; if both are the same model, with what differs in brackets.

    That is what the reports say of the decoding, since a default may have been the checkpoint's, and otherwise the
    settings, of which one may have been left to its default.
    """
    if reports[0].model != reports[1].model:
        return reports[0].model, reports[1].model
    told = [
        {**given, **{name: getattr(report, name) for name in _TOLD_BY_REPORTS}}
        for report, given in zip(reports, settings, strict=True)
    ]
    differing = [name for name in told[0] | told[1] if told[0].get(name) != told[1].get(name)]
    first, second = ({name: one.get(name) for name in differing} for one in told)
    return _in_brackets(reports[0].model, first), _in_brackets(reports[1].model, second)


_TOLD_BY_REPORTS = (
    "role",
    "decoder",
    "threshold",
    "gaps",
    "block_size",
    "steps",
    "batch_size",
    "engine",
    "dtype",
    "device",
)


def _in_brackets(model: str, settings: Mapping[str, Any]) -> str:
    values = [f"{name} {value}" for name, value in settings.items() if value is not None]
    values = values or [f"default {name}" for name in settings]
    return f"{model} ({', '.join(values)})" if values else model


def _num_forwards(report: Report) -> int:
    return sum(record.num_forwards for record in report.records)


def _share(report: Report) -> str:
    interval = wilson_interval(report.num_correct, report.n)
    return f"{interval.estimate:.1%} ({interval.low:.1%} to {interval.high:.1%})"
