"""The task gsm8k: grade-school word problems (Cobbe et al., arXiv 2110.14168), read from the files of the data set.

A line is {"question", "answer"}; the answer is a worked solution with <<calculator>> notes that ends in `#### NUMBER`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.json_files import read_rows
from fewstep.models.rows import text_of
from fewstep.tasks.problems import Problem
from fewstep.tasks.scoring import NUMBER
from fewstep.tasks.task import Task

_FIELDS = ("question", "answer")


def gsm8k_rows(file: Path) -> Iterator[dict[str, str]]:
    """Prompts and completions to train on, without the <<calculator>> notes."""
    for row in read_rows(file, required=_FIELDS):
        yield {"prompt": row["question"], "completion": re.sub(r"<<.*?>>", "", row["answer"])}


def gsm8k_problems(file: Path) -> list[Problem]:
    """The problems of a file; the answer stands behind the `####` of the last line.

    FewstepError naming the problem if a field is missing or no text, or if no number stands there, and for an
    empty file.
    """
    found = []
    for index, row in enumerate(read_rows(file, required=_FIELDS)):
        name = f"gsm8k-{file.stem}-{index:04d}"
        where = f"{file}, problem {name!r}"
        solution = text_of(row["answer"], "the answer", where)
        answer = NUMBER.reference(solution.rpartition("####")[2].strip(), where)
        found.append(Problem(name, text_of(row["question"], "the question", where), answer))
    if not found:
        raise FewstepError(f"{file} holds no problems; give a file of GSM8K")
    return found


class GSM8K(Task):
    """A folder with the files of both splits, or one file."""

    name = "gsm8k"
    about = "grade-school word problems of GSM8K; the files are the user's"
    splits = ("test", "train")
    reads = "the folder of GSM8K's test.jsonl and train.jsonl, or one such file"

    def read(self, split: str | None, n: int | None, data: Path | None) -> list[Problem]:
        """Of a folder the file of the split; a file as it is."""
        assert data is not None
        return gsm8k_problems(data / f"{split}.jsonl" if data.is_dir() else data)[:n]


TASK = GSM8K()
