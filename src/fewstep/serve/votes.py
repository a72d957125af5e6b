"""The tally of the comparison page: who was preferred, kept in a file, with intervals."""

import csv
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.errors import FewstepError
from fewstep.files import storage_errors
from fewstep.json_files import numbered_rows
from fewstep.serve.errors import ApiError
from fewstep.values import check_fields

MOST_VOTES = 100_000

Interval = Callable[[int, int], tuple[float, float]]
"""The ends of the 95 % interval of a share of so many out of so many."""


@dataclass(frozen=True, kw_only=True)
class Vote:
    """`time`: in seconds since 1970."""

    a: str
    b: str
    winner: Literal["a", "b", "tie"]
    prompt: str | None = None
    time: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


class Votes:
    """Votes in the order in which they were given. `path`: a file of JSON lines, one a vote, which is read and goes on;
    None keeps them in memory. FewstepError if the file holds anything else or cannot be written.
    """

    def __init__(self, interval: Interval, path: Path | None = None) -> None:
        self._interval, self._path = interval, path
        self.votes: list[Vote] = []
        if path is not None:
            if path.exists() and not path.is_file():
                raise FewstepError(f"votes {path} is no file that votes could be kept in; name another")
            with storage_errors(path), open(path, "a", encoding="utf-8"):
                pass
            self.votes = [_vote(row, f"{path} line {line}") for line, row in numbered_rows(path)]

    def add(self, vote: Vote) -> None:
        """Keep a vote. ApiError if there are too many."""
        if len(self.votes) >= MOST_VOTES:
            raise ApiError(f"the tally is full with {MOST_VOTES} votes; begin another file", code="tally_full")
        if self._path is not None:
            self._append(self._path, json.dumps(asdict(vote), ensure_ascii=False) + "\n")
        self.votes.append(vote)

    def _append(self, path: Path, line: str) -> None:
        try:
            with storage_errors(path), open(path, "a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except FewstepError:
            sentence = "the vote could not be written to the server's file; tell its operator"
            raise ApiError(sentence, status=503, code="storage") from None

    def tally(self) -> list[dict[str, Any]]:
        """For each pair, in the order of their first votes: counts, and how often the first was preferred among the
        votes that are no tie, with its interval; null where all are ties.
        """
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for vote in self.votes:
            swapped = (vote.b, vote.a) in counts and vote.a != vote.b
            pair = (vote.b, vote.a) if swapped else (vote.a, vote.b)
            winner = {"a": "b", "b": "a"}.get(vote.winner, "tie") if swapped else vote.winner
            counts.setdefault(pair, {"a": 0, "b": 0, "tie": 0})[winner] += 1
        return [self._row(pair, count) for pair, count in counts.items()]

    def _row(self, pair: tuple[str, str], count: dict[str, int]) -> dict[str, Any]:
        decided = count["a"] + count["b"]
        low, high = self._interval(count["a"], decided)
        return {
            "a": pair[0],
            "b": pair[1],
            "wins_a": count["a"],
            "wins_b": count["b"],
            "ties": count["tie"],
            "n": decided + count["tie"],
            "share_a": count["a"] / decided if decided else None,
            "share_a_ci95": [low, high],
        }

    def as_csv(self) -> str:
        """A line for each vote."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["time", "a", "b", "winner", "prompt"])
        for vote in self.votes:
            told = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(vote.time))
            writer.writerow([told, *map(_cell, (vote.a, vote.b, vote.winner, vote.prompt or ""))])
        return text.getvalue()


def _vote(row: Any, where: str) -> Vote:
    try:
        return Vote(**row)
    except (TypeError, FewstepError) as error:
        raise FewstepError(f"{where} is no vote ({error}); name a file of votes, or a new one") from None


def _cell(text: str) -> str:
    """Spreadsheets run what begins like a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
