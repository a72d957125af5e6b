"""`fewstep eval`: accuracy, passes, tokens per pass and time; sweeps and plots."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.cli.decoding import DecodingOptions
from fewstep.cli.extras import require
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json, ModelOptions, ProblemOptions
from fewstep.cli.report import deliver, keeping_target, note, note_kept, print_table, progress_bar
from fewstep.cli.sources import Touches, plot_stem
from fewstep.errors import FewstepError


def evaluate(
    model: ModelOptions,
    decoding: DecodingOptions,
    problems: ProblemOptions,
    sweep_thresholds: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Thresholds to evaluate one after the other, such as 0.5,0.7,0.9."),
    ] = None,
    sweep_steps: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Numbers of steps to evaluate one after the other, such as 16,32,64."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="STEM", help="Draw accuracy against tokens per forward: STEM.png and STEM.svg."),
        Touches.DRAWS,
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A report of eval --json on the same problems, such as the teacher's, to draw beside it.",
        ),
        Touches.READS,
    ] = None,
    records: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every answer as a JSON line."), Touches.WRITES
    ] = None,
    json: Json = None,
) -> None:
    """Measures accuracy with a 95 % confidence interval, passes, tokens per pass and latency."""
    thresholds = numbers(sweep_thresholds, float, "--sweep-thresholds")
    steps = numbers(sweep_steps, int, "--sweep-steps")
    if plot is not None:
        require("matplotlib")
    if baseline is not None and plot is None:
        raise FewstepError("--baseline has no effect without --plot; add it, or leave it out")
    check_model_name(model.model)
    from fewstep.engine.made_by import answers_made_by
    from fewstep.kept import kept_results
    from fewstep.measure.evaluate import check_problems, sweep
    from fewstep.measure.evaluate import evaluate as evaluate_once
    from fewstep.measure.plots import plot_accuracy

    task, asked = problems.chosen, problems.read(problems.limit)
    beside = {} if baseline is None else _baseline(baseline, problems.label, len(asked))
    lm = model.load_model()
    settings = decoding.given()
    options: dict[str, Any] = {
        "task": problems.label, "metric": task.metric, "batch_size": problems.batch_size, **settings,
    }  # fmt: skip
    swept = bool(thresholds or steps)
    num_runs = max(1, len(thresholds) + len(steps))
    if not swept:
        check_problems(lm, asked, source=problems.source, **settings)

    def made_by() -> dict[str, Any]:
        questions = [problem.question for problem in asked]
        return {**answers_made_by(lm, questions, **settings), "thresholds": thresholds, "sweep_steps": steps}

    with kept_results(keeping_target(records, json), made_by) as kept:
        note_kept(kept, len(asked) * num_runs)
        with progress_bar("evaluating", len(asked) * num_runs) as advance:
            if swept:
                reports = sweep(
                    lm, asked, thresholds=thresholds, steps=steps, progress=advance, kept=kept,
                    source=problems.source, **options,
                )  # fmt: skip
            else:
                reports = [evaluate_once(lm, asked, progress=advance, kept=kept, **options)]
        figures = [report.to_json() for report in reports]
        rows = [
            {"threshold": report.threshold, "steps": report.steps, **record}
            for report in reports
            for record in report.records_json()
        ]

        def show() -> None:
            if plot is not None:
                title = f"{problems.label}, {len(asked)} problems"
                drawn = plot_accuracy({model.model: figures, **beside}, plot_stem(plot), title=title)
                note(f"drawn: {', '.join(map(str, drawn))}")
            print_figures(figures)
            if lm.role.embedding_space is None and (why_plain := lm.choice(**settings).note) is not None:
                note(f"engine off: {why_plain}")
            promised = lm.network.calibration
            if promised is not None and any(report.calibration for report in reports):
                note(f"{model.model} {promised.sentence()}")

        deliver(json, figures if swept else figures[0], rows_path=records, rows=rows, show=show)


def _baseline(path: Path, task: str, num_problems: int) -> dict[str, list[dict[str, Any]]]:
    """The reports in a file by the name of their curve. FewstepError for other problems, or if it holds none."""
    from fewstep.json_files import read_json

    found = read_json(path)
    reports = found if isinstance(found, list) else [found]
    needed = ("model", "decoder", "task", "n", "accuracy", "accuracy_ci95", "tokens_per_forward")
    if not reports or not all(isinstance(one, dict) and all(name in one for name in needed) for one in reports):
        raise FewstepError(f"--baseline {path} holds no report of eval; write one with eval --json")
    for one in reports:
        if (one["task"], one["n"]) != (task, num_problems):
            raise FewstepError(
                f"--baseline {path} is of {one['n']} problems of {one['task']}, and these are {num_problems} of {task}"
                "; evaluate it on the same problems"
            )
    return {f"{reports[0]['model']}, {reports[0]['decoder']} (baseline)": reports}


def print_figures(figures: list[dict[str, Any]]) -> None:
    """The reports as a table with one row for each."""
    print_table(
        ["model", "decoding", "solved", "passes", "tok/pass", "seconds", "tok/s"],
        [
            [
                figure["model"],
                _decoding(figure),
                _solved(figure),
                f"{figure['num_forwards_mean']:.1f}",
                f"{figure['tokens_per_forward']:.2f}",
                f"{figure['seconds_median']:.3f}",
                f"{figure['tokens_per_second']:.0f}",
            ]
            for figure in figures
        ],
        num_texts=2,
    )


def _solved(figure: dict[str, Any]) -> str:
    low, high = figure["accuracy_ci95"]
    return f"{figure['accuracy']:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def _decoding(figure: dict[str, Any]) -> str:
    if "policy" in figure:
        return f"{figure['decoder']} {figure['policy']}"
    if figure["steps"] is not None:
        return f"{figure['decoder']} {figure['steps']} steps"
    threshold = "" if figure["threshold"] is None else f" {figure['threshold']:g}"
    return figure["decoder"] + threshold + ("" if figure["gaps"] is None else f", gaps {figure['gaps']}")


def numbers(text: str | None, kind: type, option: str) -> list[Any]:
    try:
        return [] if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise FewstepError(f"{option} is a list of numbers with commas between them, got {text!r}") from None
