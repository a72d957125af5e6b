"""The figures of the bundled models, and their cards: `python recipes/gsm_measure.py COMMAND`.

`accuracy` (many problems, spread over the visible GPUs; repeat it until all is done), `timing` (seconds at batch 1, on
a CPU or a GPU), then `cards`, which also read what gsm_throughput.py and gsm_ablation.py wrote. Every result is a JSON
file in the results folder as soon as it is there.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from run_recipe import run_recipe
from gsm_cards import Kind, Sources, card
from stages import BLOCK
from task_options import Many

from fewstep.engine.language_model import load
from fewstep.errors import FewstepError
from fewstep.files import write_text_whole
from fewstep.json_files import read_json
from fewstep.measure.compare import compare_shared, comparison_sentence
from fewstep.measure.contenders import (
    Contender,
    answer_problems,
    figure,
    load_contenders,
    markdown_table,
    time_contenders,
)
from fewstep.measure.evaluate import Report
from fewstep.measure.plots import plot_accuracy
from fewstep.measure.reports import agreement, fastest_good_enough, with_no_fewer_passes
from fewstep.measure.timing import describe_machine, speed_factors, write_figures
from fewstep.models.names import BUNDLED
from fewstep.tasks.gsm_symbolic import Split, kept_problems, problems
from fewstep.tasks.problems import Problem
from fewstep.tasks.registry import task_named

app = typer.Typer(pretty_exceptions_enable=False)
Results = Annotated[Path, typer.Option("--results", help="folder for figures")]
COLUMNS = {
    "set": lambda row: row["set"],
    "contender": lambda row: row["contender"],
    "n": figure("d", "n"),
    "solved": figure(".2%", "accuracy"),
    "tokens per forward": figure(".3f", "tokens_per_forward"),
}


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
        {**comparison.to_json(), "first": first, "second": second}
        for first, second in pairs
        if first in found and second in found and (comparison := compare_shared(found[first], found[second]))
    ]


def gather(reports: Mapping[str, Mapping[str, Report]], slack: float) -> dict[str, Any]:
    """What `accuracy.json` says: a report for each set and contender, and comparisons.

    `without_stopping`: whether the published teacher and the stopping one solve the same problems.
    """
    dev = reports["dev"]
    ready = "teacher" in dev and bool(_of(dev, "student-"))
    threshold = choose_threshold(dev, slack) if ready else 0.9
    told: dict[str, Any] = {
        "chosen_threshold": threshold,
        "gaps": dev[f"student-{threshold}"].gaps if ready else None,
        "chosen_on": f"{dev['teacher'].n} development problems, at most {100 * slack:g} points below the teacher"
        if ready
        else "not chosen",
        "rows": [],
        "comparisons": [],
        "without_stopping": [],
    }
    for name, found in reports.items():
        told["rows"] += [{"set": name, "contender": one, **report.to_json()} for one, report in found.items()]
        told["comparisons"] += [{"set": name, **row} for row in compared(found, threshold)]
        if "teacher" in found and "teacher-published" in found:
            alike, n = agreement(found["teacher-published"], found["teacher"])
            told["without_stopping"].append({"set": name, "n": n, "same_outcome_and_length": alike})
    return told


CURVES = {
    "student-": "student, cached, under a threshold",
    "untrained-": "teacher's weights, block-causal, untrained",
    "teacher-threshold-": "teacher, uncached, under a threshold",
    "teacher-steps-": "teacher, uncached, by its passes",
    "ar": "autoregressive, cached",
    "cllm": "CLLM, Jacobi, cached",
}
"""Beginning of a contender's name -> its curve. The teacher at one token a pass ends the curve of its passes."""


def accuracy_curves(found: Mapping[str, Report]) -> dict[str, list[dict[str, Any]]]:
    """For the plot: the reports of a set by curve."""
    named = {"teacher-steps-" if name == "teacher" else name: report.to_json() for name, report in found.items()}
    curves = {
        title: [row for name, row in named.items() if name.startswith(prefix)] for prefix, title in CURVES.items()
    }
    return {title: rows for title, rows in curves.items() if rows}


@app.command()
def accuracy(
    results_folder: Results = Path("results"),
    ar: str = "gsm-ar",
    cllm: str = "gsm-cllm",
    teacher: str = "gsm-teacher",
    student: str = "gsm-student",
    test: Annotated[int, typer.Option(min=1, help="test problems")] = 10_000,
    heldout: Annotated[int, typer.Option(min=1, help="problems of the held-out templates")] = 2_000,
    dev: Annotated[int, typer.Option(min=1, help="development problems, which choose the threshold")] = 1_000,
    published: Annotated[int | None, typer.Option(min=0, help="limit for the teacher without early stop")] = None,
    training_free: Annotated[int | None, typer.Option(min=0, help="limit for other ways to decode the teacher")] = None,
    threshold: Annotated[list[float], typer.Option()] = [0.9, 0.95, 0.97, 0.99],  # noqa: B006
    gaps: Annotated[int | None, typer.Option(min=0, help="with every threshold")] = 2,
    teacher_steps: Annotated[list[int], typer.Option()] = [24, 32, 48, 64],  # noqa: B006
    slack: Annotated[float, typer.Option(help="how far below the teacher the student may be, as a share")] = 0.0,
    max_new_tokens: Many = 256,
    shard: Many = 2_500,
    batch_size: Many = 1_250,
    problem_folder: Path = Path("runs/problems"),
    time_limit: Annotated[float | None, typer.Option(help="seconds after which no job is begun")] = None,
) -> None:
    """Every contender on development problems, test problems and held-out templates, then `accuracy.json`."""
    counts: dict[Split, int] = {"dev": dev, "test": test, "heldout": heldout}
    sets: dict[str, list[Problem]] = {
        split: kept_problems(split, count, problem_folder) for split, count in counts.items()
    }
    models = {"ar": ar, "cllm": cllm, "teacher": teacher, "student": student}
    rules: dict[float, dict[str, Any]] = {value: {"threshold": value, "gaps": gaps} for value in threshold}
    in_blocks = {value: {**rule, "block_size": BLOCK} for value, rule in rules.items()}  # the student's
    declared: list[tuple[str, str, dict[str, Any], int | None]] = [  # name, model, settings, limit; what matters first
        ("ar", "ar", {}, None),
        ("cllm", "cllm", {}, None),
        *((f"student-{value}", "student", rule, None) for value, rule in rules.items()),
        ("teacher", "teacher", {}, None),
        *((f"teacher-threshold-{value}", "teacher", rule, training_free) for value, rule in in_blocks.items()),
        *((f"teacher-steps-{value}", "teacher", {"steps": value}, training_free) for value in teacher_steps),
        *((f"untrained-{value}", "teacher", rule, training_free) for value, rule in in_blocks.items()),
        ("teacher-published", "teacher", {"early_stop": False}, published),  # as the stopping one, only slower
    ]
    everyone = [
        Contender(
            name=name, model=models[model], settings={"max_new_tokens": max_new_tokens, **settings}, limit=limit,
            role="block_causal" if name.startswith("untrained") else None,
        )
        for name, model, settings, limit in declared
    ]  # fmt: skip
    reports = answer_problems(
        everyone, load_contenders(everyone), sets, results_folder / "accuracy", task=task_named("gsm-symbolic"),
        batch_size=batch_size, shard=shard, time_limit_s=time_limit,
    )  # fmt: skip
    if reports is None:
        return
    told = gather(reports, slack)
    write_figures(results_folder / "accuracy.json", told)
    print(markdown_table(told["rows"], COLUMNS))
    for row in told["comparisons"]:
        print(f"{row['set']:8} {comparison_sentence(row)}")
    print(f"threshold {told['chosen_threshold']}, chosen on {told['chosen_on']}")
    try:
        plot_accuracy(accuracy_curves(reports["test"]), results_folder / "accuracy", title="Test problems")
    except FewstepError as error:  # without matplotlib; the same command draws it later from what is there
        print(error)


@app.command()
def timing(
    results_folder: Results = Path("results"),
    ar: str = "gsm-ar",
    cllm: str = "gsm-cllm",
    teacher: str = "gsm-teacher",
    student: str = "gsm-student",
    device: str = "cpu",
    num: Annotated[int, typer.Option(min=1, help="test problems")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU")] = None,
    max_new_tokens: Many = 256,
) -> None:
    """Seconds of one problem at a time, all contenders interleaved in one run: `timing-DEVICE.json`."""
    if threads:
        import torch

        torch.set_num_threads(threads)
    role = load(student, device="cpu").role
    rule = {"threshold": role.threshold, "gaps": role.gaps}
    declared: dict[str, tuple[str, dict[str, Any]]] = {
        "teacher as published": (teacher, {"early_stop": False}),
        "teacher with early stop": (teacher, {}),
        "teacher under a threshold": (teacher, {**rule, "block_size": BLOCK}),
        "student": (student, rule),
        "ar with cache": (ar, {}),
        "cllm": (cllm, {}),
    }
    everyone = [
        Contender(name=name, model=model, settings={"max_new_tokens": max_new_tokens, **settings})
        for name, (model, settings) in declared.items()
    ]
    questions = [item.question for item in problems("test", num)]
    models = load_contenders(everyone, device=device)
    timings = time_contenders(everyone, models, questions, progress=lambda: print(".", end="", flush=True))
    fast = timings["student"]
    told = {
        "machine": {**describe_machine(), "device": device},
        "n": num,
        **rule,
        "timings": {name: one.to_json() for name, one in timings.items()},
        "over_student": {
            name: one.seconds_median / fast.seconds_median for name, one in timings.items() if one is not fast
        },
        "factors": vars(speed_factors(timings["teacher as published"], timings["teacher with early stop"], fast)),
        "seconds": {name: one.seconds for name, one in timings.items()},
    }
    write_figures(results_folder / f"timing-{device}.json", told)
    print(json.dumps({"over_student": told["over_student"], "factors": told["factors"]}, indent=1))


@app.command()
def cards(
    results_folder: Results = Path("results"),
    bundled: Annotated[Path, typer.Option(help="folder that holds the models")] = BUNDLED,
    ar_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
    teacher_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
    student_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
    cllm_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
    draft_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
) -> None:
    """Write README.md of the bundled models from the results and the training reports."""
    reports = ar_report, teacher_report, student_report, cllm_report, draft_report
    for kind, path in zip(get_args(Kind), reports, strict=True):
        name = f"gsm-{kind}"
        if not (bundled / name).exists():
            continue
        sources = Sources(results_folder, [])
        for picture in ("accuracy.png", "ablation.png") if kind == "student" else ():
            if (results_folder / picture).exists():
                shutil.copy(results_folder / picture, bundled / name / picture)
        text = card(name, kind, bundled / name, read_json(path) if path else None, sources)
        write_text_whole(bundled / name / "README.md", text)
        missing = f"; left out, as not there: {', '.join(sources.missing)}" if sources.missing else ""
        print(f"{bundled / name / 'README.md'}{missing}")


if __name__ == "__main__":
    run_recipe(app)
