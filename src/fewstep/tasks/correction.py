"""The task correction: sentences with typing errors, to be written as they were."""

from dataclasses import dataclass
from pathlib import Path

from fewstep.tasks.problems import Problem, read_problems
from fewstep.tasks.scoring import RESTORED, Metric
from fewstep.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Correction(Task):
    """One file, such as those that `recipes/correction_data.py` makes. The prompt is the sentence with errors alone."""

    name = "correction"
    about = "sentences with typing errors, to be restored"
    reads = 'a file of JSON lines {"id", "question", "answer"}: the sentence with errors, and the right one'
    metrics = (RESTORED.name,)

    metric: Metric = RESTORED

    def read(self, split: str | None, n: int | None, data: Path | None) -> list[Problem]:
        """See `read_problems`."""
        assert data is not None
        return read_problems(data, metric=self.metric)[:n]


TASK = Correction()
