"""The figures of the bundled models, and their cards: `python recipes/gsm_measure.py COMMAND`.

`accuracy` (many problems, spread over the visible GPUs; repeat it until all is done), `timing` (seconds at batch 1, on
a CPU or a GPU), then `cards`, which also read what gsm_throughput.py and gsm_ablation.py wrote. Every result is a JSON
file in the results folder as soon as it is there.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gsm_cards import Kind, Sources, card, comparison_sentence
from jobs import WEIGHTS, Job, results, spread, weights_of
from stages import BLOCK

from fewstep.decode.requests import Output
from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.files import read_json, write_json_whole, write_whole
from fewstep.measure.compare import compare
from fewstep.measure.evaluate import Report, evaluate
from fewstep.measure.plots import plot_accuracy
from fewstep.measure.reports import (
    agreement,
    fastest_good_enough,
    merge_reports,
    report_columns,
    with_no_fewer_passes,
)
from fewstep.measure.timing import Timing, describe_machine, speed_factors, this_command, time_interleaved
from fewstep.models.names import BUNDLED
from fewstep.models.roles import RoleName
from fewstep.tasks.gsm_symbolic import BUNDLED_COUNTS, Split, make_problems, problems
from fewstep.tasks.problems import Problem, read_problems, write_problem_file

app = typer.Typer(pretty_exceptions_enable=False)
Results = Annotated[Path, typer.Option("--results", help="folder for figures")]


# --- accuracy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """Names or folders of the models."""

    ar: str = "gsm-ar"
    cllm: str = "gsm-cllm"
    teacher: str = "gsm-teacher"
    student: str = "gsm-student"


@dataclass(frozen=True)
class Contender:
    """One model in one role with its settings. `limit`: on so many problems of a set only."""

    name: str
    model: str
    settings: Mapping[str, Any]
    role: RoleName | None = None
    limit: int | None = None


def contenders(
    models: Models,
    thresholds: Sequence[float],
    steps: Sequence[int],
    *,
    max_new_tokens: int = 256,
    gaps: int | None = None,
    published: int | None = None,
    training_free: int | None = None,
) -> list[Contender]:
    """All that the cards show, what matters most first; every threshold with the same `gaps`.

    The published teacher (no early stop) answers as the stopping one, only slower; `published` limits its problems, and
    `training_free` those of the teacher's weights under thresholds, cut to fewer passes, or block-causal.
    """
    same = {"max_new_tokens": max_new_tokens}
    rules = {value: {**same, "threshold": value, "gaps": gaps} for value in thresholds}
    in_blocks = {"block_size": BLOCK}  # the student's
    return [
        Contender("ar", models.ar, same),
        Contender("cllm", models.cllm, same),
        *(Contender(f"student-{value}", models.student, rule) for value, rule in rules.items()),
        Contender("teacher", models.teacher, same),
        *(
            Contender(f"teacher-threshold-{value}", models.teacher, {**rule, **in_blocks}, limit=training_free)
            for value, rule in rules.items()
        ),
        *(
            Contender(f"teacher-steps-{value}", models.teacher, {**same, "steps": value}, limit=training_free)
            for value in steps
        ),
        *(
            Contender(
                f"untrained-{value}", models.teacher, {**rule, **in_blocks}, role="block_causal", limit=training_free
            )
            for value, rule in rules.items()
        ),
        Contender("teacher-published", models.teacher, {**same, "early_stop": False}, limit=published),
    ]


@cache
def loaded(name: str, role: RoleName | None = None, device: str = "auto") -> LanguageModel:
    """Once a process."""
    return load(name, role=role, device=device)


def problem_set(split: Split, count: int, folder: Path) -> list[Problem]:
    """The first `count` problems: the bundled ones, or the file SPLIT.jsonl in `folder`, made with reasoning-gym."""
    if count <= BUNDLED_COUNTS[split]:
        return problems(split, count)
    path = folder / f"{split}.jsonl"
    if not path.exists() or len(read_problems(path)) < count:
        write_problem_file(path, make_problems(split, count))
    return read_problems(path, split=split)[:count]


def accuracy_jobs(
    sets: Mapping[str, Sequence[Problem]], everyone: Sequence[Contender], *, shard: int, batch_size: int
) -> list[Job]:
    """A job for each contender and each `shard` problems of a set; sets in the order given."""
    jobs = []
    for set_name, items in sets.items():
        for contender in everyone:
            wanted = items[: contender.limit]
            for start in range(0, len(wanted), shard):
                part = wanted[start : start + shard]
                jobs.append(
                    Job(
                        name=f"{set_name}--{contender.name}--{start:06d}",
                        run=partial(answer, contender, part, batch_size),
                    )
                )
    return jobs


def answer(contender: Contender, items: Sequence[Problem], batch_size: int) -> dict[str, Any]:
    """The report on these problems; records as columns, without the texts."""
    report = evaluate(loaded(contender.model, contender.role), items, batch_size=batch_size, **contender.settings)
    return {**report_columns(report), "machine": describe_machine(), "command": this_command()}


def choose_threshold(dev: Mapping[str, Report], slack: float) -> float:
    """Of the student's thresholds, the fastest whose accuracy on development problems is at most `slack` below the
    teacher's; if none is, the most accurate.
    """
    best = fastest_good_enough(_of(dev, "student-"), dev["teacher"].accuracy - slack)
    assert best.threshold is not None
    return best.threshold


def _of(found: Mapping[str, Report], prefix: str) -> list[Report]:
    return [report for name, report in found.items() if name.startswith(prefix)]


def compared(found: Mapping[str, Report], threshold: float) -> list[dict[str, Any]]:
    """The pairs that the cards speak of, as far as both are there, on the problems that both have answered."""
    student = f"student-{threshold}"
    pairs = [(student, "teacher"), (student, "ar"), ("teacher", "ar"), ("cllm", "ar")]
    pairs += [(student, f"untrained-{threshold}")]
    pairs += [(student, name) for name in found if name.startswith("teacher-threshold-")]
    cut = {name: report for name, report in found.items() if name.startswith("teacher-steps-")}
    if student in found and (same := with_no_fewer_passes(cut, found[student])):
        pairs.append((student, same))
    return [
        {
            **compare(_among(found[first], found[second]), _among(found[second], found[first])).to_json(),
            "first": first,
            "second": second,
        }
        for first, second in pairs
        if first in found and second in found and _ids(found[first]) & _ids(found[second])
    ]


def _among(report: Report, other: Report) -> Report:
    """The report on the problems that `other` has answered too."""
    ids = _ids(other)
    records = [record for record in report.records if record.id in ids]
    return replace(report, records=records, wall_seconds=report.wall_seconds * len(records) / report.n)


def _ids(report: Report) -> set[str]:
    return {record.id for record in report.records}


def gather_accuracy(folder: Path, sets: Mapping[str, Sequence[Problem]], slack: float) -> dict[str, Any]:
    """Write and return `accuracy.json`: a report for each set and contender, of the shards there are, and comparisons.

    Two contenders are compared on the problems that both have answered.
    """
    shards: dict[tuple[str, str], list[Any]] = {}
    about: dict[str, Any] = {"command": None, "machine": None}
    for name, result in results(folder / "accuracy").items():
        set_name, contender, _ = name.split("--")
        shards.setdefault((set_name, contender), []).append(result)
        about = {key: result[key] for key in about}
    reports: dict[str, dict[str, Report]] = {name: {} for name in sets}
    for (set_name, contender), parts in shards.items():
        if set_name in sets:
            reports[set_name][contender] = merge_reports(parts, {item.id: item for item in sets[set_name]})
    dev = reports.get("dev", {})
    ready = "teacher" in dev and bool(_of(dev, "student-"))
    threshold = choose_threshold(dev, slack) if ready else 0.9
    told = {
        **about,
        "chosen_threshold": threshold,
        "gaps": dev[f"student-{threshold}"].gaps if ready else None,
        "chosen_on": f"{dev['teacher'].n} development problems, at most {100 * slack:g} points below the teacher"
        if ready
        else "not chosen",
        "rows": [
            {"set": set_name, "contender": contender, **report.to_json()}
            for set_name, found in reports.items()
            for contender, report in found.items()
        ],
        "comparisons": [
            {"set": set_name, **row} for set_name, found in reports.items() for row in compared(found, threshold)
        ],
        "without_stopping": [row for set_name, found in reports.items() for row in _without_stopping(set_name, found)],
    }
    write_json_whole(folder / "accuracy.json", told)
    return told


def _without_stopping(set_name: str, found: Mapping[str, Report]) -> list[dict[str, Any]]:
    """Whether the published teacher and the stopping one solve the same problems."""
    if "teacher" not in found or "teacher-published" not in found:
        return []
    alike, n = agreement(found["teacher-published"], found["teacher"])
    return [{"set": set_name, "n": n, "same_outcome_and_length": alike}]


CURVES = {
    "student-": "student, cached, under a threshold",
    "untrained-": "teacher's weights, block-causal, untrained",
    "teacher-threshold-": "teacher, uncached, under a threshold",
    "teacher-steps-": "teacher, uncached, by its passes",
    "ar": "autoregressive, cached",
    "cllm": "CLLM, Jacobi, cached",
}


def accuracy_curves(rows: Sequence[Mapping[str, Any]], set_name: str) -> dict[str, list[Mapping[str, Any]]]:
    """For the plot: the rows of a set by curve; the teacher at one token per pass ends the curve of its passes."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = "teacher-steps-" if row["contender"] == "teacher" else row["contender"]
        title = next((title for prefix, title in CURVES.items() if name.startswith(prefix)), None)
        if row["set"] == set_name and title is not None:
            curves.setdefault(title, []).append(row)
    return curves


@app.command()
def accuracy(
    results_folder: Results = Path("results"),
    ar: str = "gsm-ar",
    cllm: str = "gsm-cllm",
    teacher: str = "gsm-teacher",
    student: str = "gsm-student",
    test: Annotated[int, typer.Option(help="test problems")] = 10_000,
    heldout: Annotated[int, typer.Option(help="problems of the held-out templates")] = 2_000,
    dev: Annotated[int, typer.Option(help="development problems, which choose the threshold")] = 1_000,
    published: Annotated[int | None, typer.Option(help="limit of problems for the teacher without early stop")] = None,
    training_free: Annotated[
        int | None, typer.Option(help="limit for the teacher under thresholds, cut to fewer passes, or block-causal")
    ] = None,
    threshold: Annotated[list[float], typer.Option()] = [0.9, 0.95, 0.97, 0.99],  # noqa: B006
    gaps: Annotated[int | None, typer.Option(help="with every threshold")] = 2,
    teacher_steps: Annotated[list[int], typer.Option()] = [24, 32, 48, 64],  # noqa: B006
    slack: Annotated[
        float, typer.Option(help="how far below the teacher the chosen threshold may be, as a share")
    ] = 0.0,
    max_new_tokens: int = 256,
    shard: int = 2_500,
    batch_size: int = 1_250,
    problem_folder: Path = Path("runs/problems"),
    time_limit: Annotated[float | None, typer.Option(help="seconds after which no job is begun")] = None,
) -> None:
    """Every contender on development problems, test problems and held-out templates, then `accuracy.json`."""
    sets = {
        "dev": problem_set("dev", dev, problem_folder),
        "test": problem_set("test", test, problem_folder),
        "heldout": problem_set("heldout", heldout, problem_folder),
    }
    everyone = contenders(
        Models(ar, cllm, teacher, student), threshold, teacher_steps, max_new_tokens=max_new_tokens, gaps=gaps,
        published=published, training_free=training_free,
    )  # fmt: skip

    def make_jobs() -> list[Job]:
        return accuracy_jobs(sets, everyone, shard=shard, batch_size=batch_size)

    models = {"ar": ar, "cllm": cllm, "teacher": teacher, "student": student}
    settings = {
        WEIGHTS: weights_of(models), **models, "test": test, "heldout": heldout, "dev": dev,
        "published": published, "training_free": training_free, "gaps": gaps, "max_new_tokens": max_new_tokens,
        "shard": shard,
    }  # fmt: skip
    if spread(make_jobs, results_folder / "accuracy", settings=settings, time_limit_s=time_limit):
        told = gather_accuracy(results_folder, sets, slack)
        for row in told["rows"]:
            print(
                f"{row['set']:8} {row['contender']:24} n {row['n']:6} {row['accuracy']:.4f} tokens/forward "
                f"{row['tokens_per_forward']:.3f}"
            )
        for row in told["comparisons"]:
            print(f"{row['set']:8} {comparison_sentence(row)}")
        print(f"threshold {told['chosen_threshold']}, chosen on {told['chosen_on']}")
        try:
            plot_accuracy(accuracy_curves(told["rows"], "test"), results_folder / "accuracy", title="Test problems")
        except FewstepError as error:  # without matplotlib; the same command draws it later from what is there
            print(error)


# --- timing -----------------------------------------------------------------------------------------------------------


def timing_contenders(
    models: Models, *, threshold: float, gaps: int | None, device: str, max_new_tokens: int
) -> dict[str, Callable[[str], Output]]:
    """What is timed against what, by name; student and teacher under the same threshold and gaps."""
    rule = {"threshold": threshold, "gaps": gaps}
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "teacher as published": (models.teacher, {"early_stop": False}),
        "teacher with early stop": (models.teacher, {}),
        "teacher under a threshold": (models.teacher, {**rule, "block_size": BLOCK}),
        "student": (models.student, rule),
        "ar with cache": (models.ar, {}),
        "cllm": (models.cllm, {}),
    }

    def contender(name: str, chosen: Mapping[str, Any]) -> Callable[[str], Output]:
        lm = loaded(name, device=device)
        return lambda prompt: lm.generate(prompt, max_new_tokens=max_new_tokens, **chosen)

    return {name: contender(model, chosen) for name, (model, chosen) in settings.items()}


def timing_json(timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Medians, their ratios over the student's, and the factors."""
    student = timings["student"]
    return {
        "timings": {name: timing.to_json() for name, timing in timings.items()},
        "over_student": {
            name: timing.seconds_median / student.seconds_median
            for name, timing in timings.items()
            if name != "student"
        },
        "factors": vars(speed_factors(timings["teacher as published"], timings["teacher with early stop"], student)),
        "seconds": {name: timing.seconds for name, timing in timings.items()},
    }


@app.command()
def timing(
    results_folder: Results = Path("results"),
    ar: str = "gsm-ar",
    cllm: str = "gsm-cllm",
    teacher: str = "gsm-teacher",
    student: str = "gsm-student",
    device: str = "cpu",
    num: Annotated[int, typer.Option(help="test problems")] = 10,
    threads: Annotated[int | None, typer.Option(help="of the CPU")] = None,
    max_new_tokens: int = 256,
) -> None:
    """Seconds of one problem at a time, all contenders interleaved in one run: `timing-DEVICE.json`."""
    if threads:
        torch.set_num_threads(threads)
    role = loaded(student, device=device).role
    everyone = timing_contenders(
        Models(ar, cllm, teacher, student), threshold=role.threshold, gaps=role.gaps, device=device,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    items = problems("test", num)
    timings = time_interleaved(
        everyone, [item.question for item in items], progress=lambda: print(".", end="", flush=True)
    )
    told = {
        "command": this_command(),
        "machine": {**describe_machine(), "device": device},
        "n": num,
        "threshold": role.threshold,
        "gaps": role.gaps,
        **timing_json(timings),
    }
    write_json_whole(results_folder / f"timing-{device}.json", told)
    print(json.dumps({"over_student": told["over_student"], "factors": told["factors"]}, indent=1))


# --- cards ------------------------------------------------------------------------------------------------------------


@app.command()
def cards(
    results_folder: Results = Path("results"),
    bundled: Annotated[Path, typer.Option(help="folder that holds the models")] = BUNDLED,
    ar_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
    teacher_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
    student_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
    cllm_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
) -> None:
    """Write README.md of the bundled models from the results and the training reports."""
    reports: dict[Kind, Path | None] = {
        "ar": ar_report, "teacher": teacher_report, "student": student_report, "cllm": cllm_report,
    }  # fmt: skip
    for kind, path in reports.items():
        name = f"gsm-{kind}"
        if not (bundled / name).exists():
            continue
        sources = Sources(results_folder, [])
        for picture in ("accuracy.png", "ablation.png") if kind == "student" else ():
            if (results_folder / picture).exists():
                shutil.copy(results_folder / picture, bundled / name / picture)
        text = card(name, kind, bundled / name, read_json(path) if path else None, sources)
        with write_whole(bundled / name / "README.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(
            f"{bundled / name / 'README.md'}"
            + (f"; left out, as not there: {', '.join(sources.missing)}" if sources.missing else "")
        )


if __name__ == "__main__":
    app()
