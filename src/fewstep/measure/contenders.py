"""Contenders: models, and ways to decode, that answer the same prompts; their answers, times, and tables of both."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.engine.language_model import LanguageModel, load
from fewstep.engine.made_by import answers_made_by
from fewstep.errors import FewstepError
from fewstep.measure.evaluate import Report, evaluate
from fewstep.measure.jobs import Job, results, spread
from fewstep.measure.reports import merge_reports, report_columns
from fewstep.measure.timing import Timing, time_interleaved
from fewstep.models.roles import RoleName
from fewstep.tasks.problems import Problem
from fewstep.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model (name, folder or hub id) in a role, its own by default, with its settings of `LanguageModel.generate`.

    `name` stands in tables and in names of files. `limit`: how many problems of each set it answers at most.
    """

    name: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    role: RoleName | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise FewstepError(
                f"{self.name!r} cannot name a contender and its file of answers: a name is not empty, holds no / and "
                "does not begin with a dot"
            )


def load_contenders(
    contenders: Sequence[Contender], *, dtype: str = "auto", device: str = "auto"
) -> dict[str, LanguageModel]:
    """Each contender's model by its name, the same weights in the same role only once.

    FewstepError, before anything long, if two have one name, or if a model cannot decode as it is asked to.
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise FewstepError(f"every contender needs a name of its own, got {', '.join(names)}")
    models: dict[tuple[str, RoleName | None], LanguageModel] = {}
    for contender in contenders:
        place = contender.model, contender.role
        lm = models[place] = models.get(place) or load(contender.model, contender.role, dtype, device)
        lm.decoder(**contender.settings)
    return {contender.name: models[contender.model, contender.role] for contender in contenders}


def answer_problems(
    contenders: Sequence[Contender],
    models: Mapping[str, LanguageModel],
    sets: Mapping[str, Sequence[Problem]],
    folder: Path,
    *,
    task: Task,
    batch_size: int,
    shard: int | None = None,
    texts: bool = False,
    time_limit_s: float | None = None,
) -> dict[str, dict[str, Report]] | None:
    """Let everybody answer the problems of every set, and return the reports by set and contender.

    Answers are kept in `folder`, with their texts only if asked for, one file for each contender and `shard` problems
    of a set (by default all): a rerun does what is missing. A report is of the shards there are, and one without any is
    left out; `num_kept` of its answers are of an earlier run. The jobs are shared by the visible GPUs, and None is
    returned in a process that only works, see `spread`. FewstepError, before any answer, for a set without
    problems and for kept answers of other weights, settings or problems.
    """
    jobs: dict[tuple[str, str, int], Job] = {}
    for set_name, problems in sets.items():
        if not problems:
            raise FewstepError(f"there is nothing to answer in {set_name}: give at least one problem")
        for one in contenders:
            lm, asked = models[one.name], problems[: one.limit]
            size = shard or max(1, len(asked))
            for start in range(0, len(asked), size):
                part = asked[start : start + size]
                jobs[set_name, one.name, start] = Job(
                    name=f"{set_name}--{one.name}--{start:06d}",
                    made_by={
                        **answers_made_by(lm, [problem.question for problem in part], **one.settings),
                        "task": task.name,
                        "metric": task.metric.name,
                        "num_problems": len(part),
                        "answers": _hash_of([[problem.id, problem.answer] for problem in part]),
                        "batch_size": batch_size,
                    },
                    run=partial(_answered, lm, part, task, batch_size, one.settings, texts=texts),
                )
    earlier = results(list(jobs.values()), folder)
    found = spread(list(jobs.values()), folder, time_limit_s=time_limit_s)
    if found is None:
        return None
    reports: dict[str, dict[str, Report]] = {set_name: {} for set_name in sets}
    for set_name, problems in sets.items():
        by_id = {problem.id: problem for problem in problems}
        for one in contenders:
            names = [job.name for (its_set, name, _), job in jobs.items() if (its_set, name) == (set_name, one.name)]
            if parts := [found[name] for name in names if name in found]:
                num_kept = sum(len(found[name]["ids"]) for name in names if name in earlier)
                reports[set_name][one.name] = replace(merge_reports(parts, by_id), num_kept=num_kept)
    return reports


def _answered(
    lm: LanguageModel,
    problems: Sequence[Problem],
    task: Task,
    batch_size: int,
    settings: Mapping[str, Any],
    *,
    texts: bool,
) -> dict[str, Any]:
    report = evaluate(lm, problems, task=task.name, metric=task.metric, batch_size=batch_size, **settings)
    return report_columns(report, texts=texts)


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def time_contenders(
    contenders: Sequence[Contender],
    models: Mapping[str, LanguageModel],
    prompts: Sequence[Any],
    *,
    progress: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Everybody's times at batch 1 by name, all taking turns at each prompt (see `time_interleaved`)."""
    takers = {one.name: partial(models[one.name].generate, **one.settings) for one in contenders}
    return time_interleaved(takers, prompts, progress=progress)


Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]
"""Heading -> the cell of a row."""


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """A line for each row, below the headings."""
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure(form: str, *keys: str) -> Callable[[Mapping[str, Any]], str]:
    """The cell of a number under these keys in this format; empty if it is not there."""

    def cell(row: Mapping[str, Any]) -> str:
        value: Any = row
        for key in keys:
            value = None if value is None else value.get(key)
        return "" if value is None else format(value, form)

    return cell


def with_interval(form: str, key: str, factor: float = 1.0) -> Callable[[Mapping[str, Any]], str]:
    """The cell of an estimate and the ends of its interval, a list under this key: `93.1 (92.0 to 94.1)`; empty if it
    is not there. The numbers, in this format, are multiplied by `factor`.
    """

    def cell(row: Mapping[str, Any]) -> str:
        if row.get(key) is None:
            return ""
        estimate, low, high = (format(factor * value, form) for value in row[key])
        return f"{estimate} ({low} to {high})"

    return cell


def table_by_passes(rows: Sequence[Mapping[str, Any]], passes: Sequence[int]) -> str:
    """Solved problems with their intervals: a line for each model and decoder, a column for each number of passes.

    Rows are those of reports, with their `steps`; what share of answers by several seeds is distinct may be among them.
    """
    lines = ["| model | sampler | " + " | ".join(map(str, passes)) + " |", "|---" * (2 + len(passes)) + "|"]
    kinds = dict.fromkeys((row["model"], row["decoder"]) for row in rows)
    for model, sampler in kinds:
        found = {row["steps"]: row for row in rows if (row["model"], row["decoder"]) == (model, sampler)}
        cells = [_cell(found[steps]) if steps in found else "" for steps in passes]
        lines.append(f"| {model} | {sampler} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any]) -> str:
    low, high = row["accuracy_ci95"]
    seeds = f", {row['distinct_answers']:.0%} distinct" if "distinct_answers" in row else ""
    return f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%}){seeds}"
