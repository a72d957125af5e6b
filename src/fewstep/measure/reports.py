"""Several reports together: the shards of one, and the choice among settings that were all evaluated."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fewstep.errors import FewstepError
from fewstep.measure.evaluate import Record, Report
from fewstep.tasks.problems import Problem
from fewstep.tasks.scoring import NUMBER


def report_columns(report: Report, *, texts: bool = False) -> dict[str, Any]:
    """The report and its records, a list for each field; `merge_reports` reads it.

    Texts are among them only if asked for, or if chrF is computed from them.
    """
    records = report.records
    return {
        "report": report.to_json(),
        "wall_seconds": report.wall_seconds,
        "ids": [record.id for record in records],
        "correct": "".join(str(int(record.correct)) for record in records),
        "num_tokens": [record.num_tokens for record in records],
        "num_forwards": [record.num_forwards for record in records],
        "num_draft_forwards": [record.num_draft_forwards for record in records],
        "seconds": [round(record.seconds, 4) for record in records],
        **({"texts": [record.text for record in records]} if texts or report.metric != NUMBER.name else {}),
    }


def merge_reports(shards: Sequence[Mapping[str, Any]], problems: Mapping[str, Problem]) -> Report:
    """Shards of one evaluation, as `report_columns` made them, as one report. Wall seconds add up, as on one device.

    `problems`: by id.
    """
    told = shards[0]["report"]
    records = [
        Record(
            id=name, template=problems[name].template, answer=problems[name].answer, text=text, correct=mark == "1",
            num_tokens=tokens, num_forwards=forwards, num_draft_forwards=drafts, seconds=seconds, finish_reason="",
        )
        for part in shards
        for name, text, mark, tokens, forwards, drafts, seconds in zip(
            part["ids"], part.get("texts", [""] * len(part["ids"])), part["correct"], part["num_tokens"],
            part["num_forwards"], part["num_draft_forwards"], part["seconds"], strict=True,
        )
    ]  # fmt: skip
    own = ("records", "wall_seconds", "step_ms", "num_kept")
    shared = [field.name for field in fields(Report) if field.name not in own]
    for part in shards:
        if differing := [key for key in shared if part["report"].get(key) != told.get(key)]:
            raise FewstepError(f"shards of one report differ in {', '.join(differing)}; empty their folder")
    return Report(
        **{key: told[key] for key in shared if key in told},
        records=records,
        wall_seconds=sum(part["wall_seconds"] for part in shards),
        step_ms=statistics.median(part["report"]["step_ms"] for part in shards),
        num_kept=sum(part["report"].get("answered_earlier", 0) for part in shards),
    )


def fastest_good_enough(reports: Sequence[Report], accuracy: float) -> Report:
    """The one with most tokens per forward among those of at least this accuracy; if none is, the most accurate."""
    enough = [report for report in reports if report.accuracy >= accuracy]
    if enough:
        return max(enough, key=lambda report: report.tokens_per_forward)
    return max(reports, key=lambda report: report.accuracy)


def with_no_fewer_passes(reports: Mapping[str, Report], other: Report) -> str | None:
    """The name of the report with fewest passes that has, on average, as many as `other`; None if none has."""
    passes = {name: _mean_passes(report) for name, report in reports.items()}
    enough = [name for name in passes if passes[name] >= _mean_passes(other)]
    return min(enough, key=passes.__getitem__, default=None)


def _mean_passes(report: Report) -> float:
    return statistics.fmean(record.num_forwards for record in report.records)


def agreement(first: Report, second: Report) -> tuple[int, int]:
    """Of the problems of `first` that `second` answered too: how many end alike, solved or not with as many tokens, and
    how many there are.
    """
    known = {record.id: (record.correct, record.num_tokens) for record in second.records}
    shared = [record for record in first.records if record.id in known]
    return sum((record.correct, record.num_tokens) == known[record.id] for record in shared), len(shared)
