"""The fastest setting of a lossy student whose loss against a reference is at most eps, with a stated confidence.

Learn then Test (Angelopoulos and others, arXiv 2110.01052) with fixed sequences: the settings stand in paths, each from
the most careful to the fastest, which are fixed before any answer is seen. Along a path each setting is tested at the
same level until one is not certified; nothing behind that one is tried. The probability that any setting is certified
whose true loss is eps or more is then at most 1 - confidence, whichever of the certified settings is chosen afterwards.
Several paths share that error evenly.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from fewstep.errors import FewstepError
from fewstep.measure.compare import check_same_problems
from fewstep.measure.evaluate import Report
from fewstep.measure.noninferiority import Pairs, p_value, upper_bound

THRESHOLDS = (0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""A path where none is given."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A setting: see `Threshold`."""

    threshold: float
    gaps: int | None

    def __str__(self) -> str:
        return f"threshold {self.threshold:g}, {'any number of' if self.gaps is None else self.gaps} gaps"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How the student did under a rule. `seconds`: the median of the problems."""

    rule: Rule
    pairs: Pairs
    accuracy: float
    tokens_per_forward: float
    seconds: float

    @classmethod
    def of(cls, rule: Rule, student: Report, reference: Report) -> "Measured":
        """FewstepError unless both answered the same problems in the same order."""
        check_same_problems(student, reference)
        pairs = list(zip(reference.records, student.records, strict=True))
        return cls(
            rule=rule,
            pairs=Pairs(
                only_reference=sum(one.correct and not other.correct for one, other in pairs),
                only_student=sum(other.correct and not one.correct for one, other in pairs),
                n=student.n,
            ),
            accuracy=student.accuracy,
            tokens_per_forward=student.tokens_per_forward,
            seconds=statistics.median(record.seconds for record in student.records),
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A rule that was tested: certified if its p-value is at most `level`."""

    measured: Measured
    p_value: float
    level: float

    @property
    def certified(self) -> bool:
        return self.p_value <= self.level

    @property
    def bound(self) -> float:
        """The loss under this rule is below it, with the confidence of this one statement.

        It is not corrected for the choice among the rules: what holds for the chosen one is eps.
        """
        return upper_bound(self.measured.pairs, 1 - self.level)

    def to_json(self) -> dict[str, Any]:
        measured = self.measured
        return {
            **asdict(measured.rule),
            "accuracy": measured.accuracy,
            "loss": measured.pairs.loss,
            "only_reference": measured.pairs.only_reference,
            "only_student": measured.pairs.only_student,
            "p_value": self.p_value,
            "bound": self.bound,
            "certified": self.certified,
            "tokens_per_forward": measured.tokens_per_forward,
            "seconds_median": measured.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was tried, in order; `chosen` is the fastest certified trial, None if there is none."""

    trials: list[Trial]

    @property
    def chosen(self) -> Trial | None:
        certified = [trial for trial in self.trials if trial.certified]
        return max(certified, key=lambda one: (one.measured.tokens_per_forward, -one.measured.seconds), default=None)

    @property
    def closest(self) -> Trial:
        """The trial with the least p-value."""
        return min(self.trials, key=lambda trial: (trial.p_value, trial.measured.pairs.loss))


def paths_of(thresholds: Sequence[float], gaps: Sequence[int | None]) -> list[list[Rule]]:
    """A path of falling thresholds for each number of gaps. FewstepError if one is given twice, or if there is none."""
    for name, values in (("thresholds", thresholds), ("gaps", gaps)):
        if not values or len(set(values)) < len(values):
            raise FewstepError(f"{name} must be one or more different numbers, got {list(values)}")
    falling = sorted(thresholds, reverse=True)
    return [[Rule(threshold=threshold, gaps=count) for threshold in falling] for count in gaps]


def calibrate(
    paths: Sequence[Sequence[Rule]], measure: Callable[[Rule], Measured], *, eps: float, confidence: float
) -> Outcome:
    """Test each path up to the first rule that is not certified; `measure` is asked for no rule behind that one.

    FewstepError unless eps and confidence lie between 0 and 1.
    """
    for name, value in (("eps", eps), ("confidence", confidence)):
        if not 0 < value < 1:
            raise FewstepError(f"{name} must lie between 0 and 1, got {value:g}")
    level = (1 - confidence) / len(paths)
    trials = []
    for path in paths:
        for rule in path:
            measured = measure(rule)
            trials.append(Trial(measured=measured, p_value=p_value(measured.pairs, eps), level=level))
            if not trials[-1].certified:
                break
    return Outcome(trials=trials)


def repeated(
    table: Mapping[str, Report],
    paths: Sequence[Sequence[Rule]],
    *,
    eps: float,
    confidence: float,
    n: int,
    calibrations: int,
) -> dict[str, Any]:
    """Calibrate so many times, each on the next `n` problems, and judge each choice on the problems behind them all.

    `table`: reports of the same problems by the name of the rule, and that of the `reference`. `chosen` of the result
    are the rules with their loss on those problems, `within` says how many lose at most `eps`.
    """

    def measured(places: slice, rule: Rule) -> Measured:
        student, reference = (
            replace(one, records=one.records[places]) for one in (table[str(rule)], table["reference"])
        )
        return Measured.of(rule, student, reference)

    fresh = slice(calibrations * n, None)
    rows = []
    for start in range(0, calibrations * n, n):
        chosen = calibrate(paths, partial(measured, slice(start, start + n)), eps=eps, confidence=confidence).chosen
        if chosen is not None:
            rule = chosen.measured.rule
            rows.append({**asdict(rule), "loss": measured(fresh, rule).pairs.loss})
    within = sum(row["loss"] <= eps for row in rows)
    return {
        "eps": eps, "confidence": confidence, "n": n, "calibrations": calibrations, "within": within, "chosen": rows,
    }  # fmt: skip
