"""The task jsonl: problems of the user's own, a JSON object a line."""

from pathlib import Path

from fewstep.tasks.problems import Problem, read_problems
from fewstep.tasks.scoring import METRICS
from fewstep.tasks.task import Task


class JSONL(Task):
    """One file; the metric says what its answers are."""

    name = "jsonl"
    about = "problems of the user's own, from a JSONL file"
    reads = 'a file of JSON lines {"id", "question", "answer"}'
    metrics = tuple(METRICS)

    def read(self, split: str | None, n: int | None, data: Path | None) -> list[Problem]:
        """See `read_problems`."""
        assert data is not None
        return read_problems(data, metric=self.metric)[:n]


TASK = JSONL()
