"""Problems, and the JSONL files that hold them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.json_files import numbered_rows, write_rows_whole
from fewstep.models.rows import id_text, messages_of, present, row_id, text_of
from fewstep.models.text import Message
from fewstep.tasks.scoring import NUMBER, Metric
from fewstep.values import fitted


@dataclass(frozen=True)
class Problem:
    """One question with its answer as text ("36", "4.5"); `template` is None for problems that are made from none.

    The question is text; a problem from elsewhere may have a conversation in its place.
    """

    id: str
    question: str | list[Message]
    answer: str
    template: int | None = None
    split: str | None = None

    @property
    def last_turn(self) -> str:
        """The question, or what the last message of the conversation says."""
        return self.question if isinstance(self.question, str) else self.question[-1]["content"]


def read_problems(path: Path, split: str | None = None, metric: Metric = NUMBER) -> list[Problem]:
    """Problems from JSONL lines {"id", "question", "answer"} and optionally "template".

    A conversation, as "messages", may stand in place of the question; the id is the line's number if there is none. The
    answer is what the metric takes, by default a number or the text of one. FewstepError names file and line for a
    missing field or another answer.
    """
    found = []
    for line, row in numbered_rows(path):
        where = f"{path} line {line}"
        row = present(row)
        if "answer" not in row or not {"question", "messages"} & row.keys():
            missing = "answer" if "answer" not in row else "question"
            has = ", ".join(map(repr, row)) or "none"
            raise FewstepError(f"{where} has no field {missing!r}; its fields are: {has}")
        question = (
            messages_of(row["messages"], "messages", where)
            if "question" not in row
            else text_of(row["question"], "the question (a conversation is given as messages)", where)
        )
        answer = metric.reference(row["answer"], where)
        found.append(Problem(id_text(row_id(row, line)), question, answer, _template(row, where), split))
    if not found:
        raise FewstepError(f"{path} holds no problems; give lines with id, question and answer.")
    return found


def _template(row: Mapping[str, Any], where: str) -> int | None:
    return fitted(row.get("template"), int | None, f"{where}: template")


def write_problem_file(path: Path, problems_to_write: Sequence[Problem]) -> None:
    """JSONL lines {"id", "question", "answer", "template"}, written whole."""
    write_rows_whole(
        path,
        ({"id": p.id, "question": p.question, "answer": p.answer, "template": p.template} for p in problems_to_write),
    )
