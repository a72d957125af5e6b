"""The contract of a task: which problems it asks, and what counts as a right answer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from fewstep.errors import FewstepError, suggestion
from fewstep.tasks.problems import Problem
from fewstep.tasks.scoring import NUMBER, Metric, metric_named


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What a model is asked, and how its answers are judged; a new task defines `name`, `about` and `read`.

    `splits`: the parts it has, the default first; none if a file is all there is. `reads`: what file or folder the user
    gives, None if the problems ship with the package; `ships`: whether some do, although it reads data too. `metrics`:
    those that a user may choose from.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str | None] = None
    ships: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = (NUMBER.name,)

    metric: Metric = NUMBER

    @abstractmethod
    def read(self, split: str | None, n: int | None, data: Path | None) -> list[Problem]:
        """The first `n` problems, or all; `problems` has checked that split and data are those the task has."""

    def problems(self, split: str | None = None, n: int | None = None, *, data: Path | None = None) -> list[Problem]:
        """The first `n` problems of a split, by default all of the first one.

        FewstepError for a split that the task does not have, for data that it does not read or that is missing, and for
        damaged files.
        """
        if data is None and self.reads is not None and not self.ships:
            raise FewstepError(f"data must be given for the task {self.name}: {self.reads}")
        if data is not None and self.reads is None:
            raise FewstepError(
                f"data is not read by the task {self.name}, whose problems ship with the package; leave it out, or "
                "choose the task jsonl"
            )
        if split is not None and not self.splits:
            raise FewstepError(f"split must be left out, since the task {self.name} has none")
        if split is not None and data is not None and data.is_file():
            raise FewstepError(f"split must be left out, since {data} is one file")
        if split is not None:
            self.check_split(split)
        return self.read(split or next(iter(self.splits), None), n, data)

    def check_split(self, split: str) -> None:
        """FewstepError unless it is one of the task's."""
        if split not in self.splits:
            hint = suggestion(split, self.splits)
            raise FewstepError(f"split must be one that the task {self.name} has, got {split!r}; {hint}")

    def extract(self, text: str) -> str | float | None:
        """The answer that a text gives, in its normalised form; None for none."""
        return self.metric.extract(text)

    def is_correct(self, text: str, answer: str) -> bool:
        """Whether a text gives the right answer of a problem."""
        return self.metric.is_correct(text, answer)

    def judged_by(self, metric: str) -> "Task":
        """The same task with another metric. FewstepError for a metric that it does not have."""
        chosen = metric_named(metric)
        if metric not in self.metrics:
            raise FewstepError(
                f"metric must be {' or '.join(self.metrics)} for the task {self.name}, got {metric!r}; the task jsonl "
                "takes every metric"
            )
        return replace(self, metric=chosen)
