"""The task correction: sentences with typing errors, to be written as they were."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.tasks.problems import Problem, read_problems
from fewstep.tasks.scoring import RESTORED, Metric
from fewstep.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Correction(Task):
    """The prompt is the sentence with errors alone. Without a file, sentences in the public domain that ship with the
    package: of SQLite's documentation and of a novel, none of them in the training part of
    `recipes/correction_data.py`.
    """

    name = "correction"
    about = "sentences with typing errors, to be restored"
    splits = ("test",)
    reads = 'a file of JSON lines {"id", "question", "answer"}: the sentence with errors, and the right one'
    ships = True
    metrics = (RESTORED.name,)

    metric: Metric = RESTORED

    def read(self, split: str | None, n: int | None, data: Path | None) -> list[Problem]:
        """See `read_problems`. FewstepError if fewer ship than are asked for."""
        if data is not None:
            return read_problems(data, metric=self.metric)[:n]
        with resources.as_file(resources.files("fewstep") / "bundled/correction-problems/test.jsonl") as path:
            found = read_problems(path, split="test", metric=self.metric)
        if n is not None and n > len(found):
            raise FewstepError(f"{n} problems were asked for, {len(found)} are bundled; give a file with data")
        return found[:n]


TASK = Correction()
