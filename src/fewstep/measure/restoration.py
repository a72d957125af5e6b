"""How well sentences with errors are restored, beside those that had none and should stay."""

from collections.abc import Sequence
from typing import Any

from fewstep.measure.metrics import chrf_interval, paired_interval, wilson_interval
from fewstep.tasks.problems import Problem
from fewstep.tasks.scoring import RESTORED


def restoration(
    texts: Sequence[str], problems: Sequence[Problem], baseline: Sequence[bool] | None = None
) -> dict[str, Any]:
    """Figures by name for the answers to problems of the task `correction`.

    `restored` (a share), `chrf` (0 to 100) and, over the answers of a `baseline` of which it is given which are right,
    `difference` (None without one) are each an estimate and the ends of its 95 % interval. `percent_of_wrong` are
    restored of the sentences with errors, `percent_of_right` left alone of those without; None where there are none.
    `right`: which answers are right, for comparisons. ValueError for another number of texts than of problems.
    """
    right = [RESTORED.is_correct(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
    wrong = [problem.question != problem.answer for problem in problems]

    def percent(kind: bool) -> float | None:
        of_kind = [one for one, is_wrong in zip(right, wrong, strict=True) if is_wrong is kind]
        return 100 * sum(of_kind) / len(of_kind) if of_kind else None

    intervals = {
        "restored": wilson_interval(sum(right), len(right)),
        "chrf": chrf_interval(texts, [problem.answer for problem in problems]),
        "difference": None if baseline is None else paired_interval(right, baseline),
    }
    return {
        "n": len(problems),
        "right": right,
        **{name: one and [one.estimate, one.low, one.high] for name, one in intervals.items()},
        "percent_of_wrong": percent(True),
        "percent_of_right": percent(False),
    }
