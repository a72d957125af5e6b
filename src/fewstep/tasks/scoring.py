"""What counts as a right answer: how the right one is given, how one is read from a text, and when the two agree."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

from fewstep.errors import FewstepError, suggestion
from fewstep.models.rows import text_of
from fewstep.tasks.answers import extract_answer, is_correct
from fewstep.tasks.text_metrics import contains, is_exact, is_same_normalised, normalise
from fewstep.values import shown


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One way to judge answers.

    `reference(value, where)` is the right answer of a row as text, or a FewstepError naming `where`; `extract(text)`
    the answer that a text gives, in its normalised form (None if it gives none); `is_correct(text, answer)` the
    verdict.
    """

    name: str
    about: str
    reference: Callable[[Any, str], str]
    extract: Callable[[str], str | float | None]
    is_correct: Callable[[str, str], bool]


def number_of(value: Any, where: str) -> str:
    """A finite number, or the text of one, as text without thousands commas. FewstepError if it is none."""
    answer = str(value).replace(",", "").strip()
    if isinstance(value, bool) or not _is_number(answer):
        raise FewstepError(f"{where}: the answer is {shown(value)}; give a number.")
    return answer


def _is_number(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False


def words_of(value: Any, where: str) -> str:
    """Text with at least one word, or a number as text. FewstepError if it is neither."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    answer = str(value) if is_number else text_of(value, "the answer", where)
    if not normalise(answer):
        raise FewstepError(f"{where}: the answer is {shown(value)}; give a text with a word or a number in it.")
    return answer


NUMBER = Metric(
    name="number",
    about="the number that the text gives as its answer equals the right one",
    reference=number_of,
    extract=extract_answer,
    is_correct=is_correct,
)
EXACT = Metric(
    name="exact",
    about="the text equals the right one, apart from white space at its ends",
    reference=words_of,
    extract=str.strip,
    is_correct=is_exact,
)
NORMALISED = Metric(
    name="normalised",
    about="the texts are equal when capitals, and punctuation at the ends of words, are ignored",
    reference=words_of,
    extract=normalise,
    is_correct=is_same_normalised,
)
RESTORED = Metric(
    name="restored",
    about="the texts are equal, apart from how much white space stands between words",
    reference=words_of,
    extract=lambda text: " ".join(text.split()),
    is_correct=lambda text, answer: text.split() == answer.split(),
)
CONTAINS = Metric(
    name="contains",
    about="the normalised text contains the right answer as whole words",
    reference=words_of,
    extract=normalise,
    is_correct=contains,
)

METRICS = {metric.name: metric for metric in (NUMBER, EXACT, RESTORED, NORMALISED, CONTAINS)}


def metric_named(name: str) -> Metric:
    """FewstepError for an unknown name."""
    if name not in METRICS:
        raise FewstepError(f"{name!r} is no metric; {suggestion(name, METRICS)}")
    return METRICS[name]
