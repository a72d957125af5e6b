"""Every way to decode a causal model in fewer passes, side by side: a table and a plot.

    python recipes/compare_decoders.py --heads runs/cllm/medusa --draft runs/cllm/draft

The same problems are answered in a batch, which gives accuracy, passes and throughput, and then one by one, all
contenders taking turns at each, which gives the time of a pass and the tokens per second of a single answer. What needs
a model that is not there is left out, and the table says so. Answers in batches are kept, one file a contender, with
their throughput: a rerun does what is missing and times all at batch 1 again. With several GPUs contenders share them,
and throughput is that beside the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import typer
from jobs import Job, finished, result_path, results, spread
from run_recipe import run_recipe
from task_options import TaskData, TaskName, TaskSplit

from fewstep.engine.language_model import LanguageModel, load
from fewstep.engine.made_by import check_made_by, made_by
from fewstep.errors import FewstepError
from fewstep.files import write_json_whole, write_whole
from fewstep.measure.evaluate import Report, evaluate
from fewstep.measure.metrics import paired_interval
from fewstep.measure.plots import plot_accuracy
from fewstep.measure.reports import merge_reports, report_columns
from fewstep.measure.timing import Timing, describe_machine, this_command, time_interleaved
from fewstep.models.names import bundled_names
from fewstep.tasks.problems import Problem
from fewstep.tasks.registry import task_named
from fewstep.tasks.task import Task

app = typer.Typer(pretty_exceptions_enable=False)

BASELINE = "autoregressive"
SOURCE = "arXiv 2403.00835, LLaMA2-7B on GSM8K, quoted second-hand"
PUBLISHED = {
    BASELINE: {"tokens_per_second": 43.5, "accuracy": 0.591},
    "jacobi": {"tokens_per_second": 45.7},
    "lookahead": {"tokens_per_second": 74.8},
    "CLLM": {"tokens_per_second": 132.4, "accuracy": 0.564},
}
"""Rows of the published table, by our names for them."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model and how it decodes. `needs`: models and heads that must be there, by option; None: not given."""

    model: str | None
    settings: Mapping[str, Any]
    needs: Mapping[str, str | None] = field(default_factory=dict)

    def missing(self) -> str | None:
        """Why it is left out, or None."""
        for option, value in self.needs.items():
            if value is None:
                return f"--{option} was not given"
            if not Path(value).is_dir() and value not in bundled_names():
                return f"{value} is neither a folder nor a bundled model"
        return None


def contenders(
    model: str, cllm: str | None, draft: str | None, heads: str | None, student: str | None, window: int
) -> dict[str, Contender]:
    """By name, the baseline first."""
    published: dict[str, Any] = {"decoder": "jacobi", "window": window, "fixed_windows": True}
    sliding: dict[str, Any] = {"decoder": "jacobi", "window": window}
    trained = {"cllm": cllm}
    return {
        BASELINE: Contender(model=model, settings={"decoder": BASELINE}),
        "jacobi": Contender(model=model, settings=published),
        "jacobi, sliding": Contender(model=model, settings=sliding),
        "lookahead": Contender(model=model, settings={"decoder": "lookahead"}),
        "prompt-lookup": Contender(model=model, settings={"decoder": "prompt-lookup"}),
        "medusa": Contender(model=model, settings={"decoder": "medusa", "heads": heads}, needs={"heads": heads}),
        "speculative": Contender(
            model=model, settings={"decoder": "speculative", "draft": draft}, needs={"draft": draft}
        ),
        "CLLM": Contender(model=cllm, settings=published, needs=trained),
        "CLLM, sliding": Contender(model=cllm, settings=sliding, needs=trained),
        "CLLM, sliding, twice as long": Contender(
            model=cllm, settings={**sliding, "window": 2 * window}, needs=trained
        ),
        "CLLM + lookahead": Contender(model=cllm, settings={"decoder": "lookahead"}, needs=trained),
        "CLLM, one token a pass": Contender(model=cllm, settings={"decoder": BASELINE}, needs=trained),
        "CDLM student": Contender(model=student, settings={}, needs={"student": student}),
    }


def extra_parameters(lm: LanguageModel, settings: Mapping[str, Any], baseline: LanguageModel) -> int:
    """What a contender keeps in memory beyond the baseline's weights: heads, a draft, or a larger network."""
    decoder: Any = lm.decoder(**settings)
    beside = 0
    if decoder.name == "medusa":
        beside = sum(parameter.numel() for parameter in decoder.heads.parameters())
    elif decoder.name == "speculative":
        beside = decoder.draft.num_parameters
    return lm.network.num_parameters + beside - baseline.network.num_parameters


def row_of(name: str, batched: Report, alone: Timing, baseline: tuple[Report, Timing], extra: int) -> dict[str, Any]:
    """One line of the table; ratios and differences are against the baseline."""
    report, timing = baseline
    right, right_baseline = ([record.correct for record in one.records] for one in (batched, report))
    difference = paired_interval(right, right_baseline)
    same = [a.text == b.text for a, b in zip(batched.records, report.records, strict=True)]
    return {
        "contender": name,
        **batched.to_json(),
        "accuracy_difference": difference.estimate,
        "accuracy_difference_ci95": [difference.low, difference.high],
        "same_answers": sum(same) / len(same),
        "batch_1": alone.to_json(),
        "speed_ratio": sum(timing.seconds) / sum(alone.seconds),
        "extra_parameters": extra,
        "published": PUBLISHED.get(name),
    }


def table_of(rows: Sequence[Mapping[str, Any]], absent: Mapping[str, str], kept: Sequence[str]) -> str:
    """Markdown: our figures, the published ones beside them, what was left out, and what an earlier run answered."""
    lines = [
        "| decoder | tokens/pass | ms/pass, batch 1 | tokens/s, batch 1 | times as fast | tokens/s, batched | solved | "
        "same answers | extra parameters | published tokens/s | published speed | published solved |",
        "|---|" + "---|" * 11,
    ]
    for row in rows:
        alone, published = row["batch_1"], row["published"] or {}
        published_speed = published.get("tokens_per_second")
        cells = [
            row["contender"],
            f"{row['tokens_per_forward']:.2f}",
            f"{alone['step_ms']:.1f}",
            f"{alone['tokens_per_second']:.0f}",
            f"{row['speed_ratio']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['accuracy']:.1%}",
            f"{row['same_answers']:.1%}",
            f"{row['extra_parameters'] / 1e6:.2f} M",
            f"{published_speed}" if published_speed else "",
            f"{published_speed / PUBLISHED[BASELINE]['tokens_per_second']:.1f}" if published_speed else "",
            f"{published['accuracy']:.1%}" if "accuracy" in published else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Published: {SOURCE}.", *(f"Left out: {name}, since {why}." for name, why in absent.items())]
    if kept:
        lines.append(f"Answered in an earlier run, which their tokens/s in batches are of: {'; '.join(kept)}.")
    return "\n".join(lines)


def plot_speeds(rows: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """Tokens per pass and times as fast as the baseline, as bars."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise FewstepError("Plots need matplotlib: pip install 'fewstep[eval]'.") from None
    figure = Figure(figsize=(9, 0.8 + 0.35 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    names = [row["contender"] for row in rows]
    titles = {"tokens_per_forward": "tokens per pass", "speed_ratio": "times as fast as one token a pass, batch 1"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        bars = axes.barh(names, [row[key] for row in rows])
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.12)
    axes.invert_yaxis()
    for suffix in ("png", "svg"):
        with write_whole(stem.with_name(f"{stem.name}.{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix)


@cache
def loaded(model: str, device: str) -> LanguageModel:
    return load(model, device=device)


def answered(
    model: str, device: str, settings: Mapping[str, Any], task: Task, items: Sequence[Problem], batch_size: int
) -> dict[str, Any]:
    """The answers of one contender in batches, as `report_columns` keeps them."""
    lm = loaded(model, device)
    report = evaluate(lm, items, task=task.name, metric=task.metric, batch_size=batch_size, **settings)
    return {"made_by": made_by(lm), **report_columns(report, texts=True)}


@app.command()
def compare(
    folder: Annotated[
        Path, typer.Option("--results", help="folder for comparison.json, .md, the plots and the answers")
    ] = Path("results/decoders"),
    model: Annotated[str, typer.Option(help="the causal model")] = "gsm-ar",
    cllm: Annotated[str | None, typer.Option(help="the same, trained by recipes/cllm.py")] = "gsm-cllm",
    draft: Annotated[str | None, typer.Option(help="a small model of the same vocabulary")] = None,
    heads: Annotated[str | None, typer.Option(help="folder of Medusa heads for the model")] = None,
    student: Annotated[str | None, typer.Option(help="a CDLM student")] = "gsm-student",
    window: Annotated[int, typer.Option(help="of the Jacobi decoder")] = 16,
    task: TaskName = "gsm-symbolic",
    data: TaskData = None,
    split: TaskSplit = None,
    count: Annotated[int, typer.Option("--problems", help="of the task, answered in batches")] = 1000,
    timed: Annotated[int, typer.Option(help="of them, answered one by one")] = 50,
    batch_size: int = 64,
    max_new_tokens: int = 256,
    device: str = "auto",
) -> None:
    """Compare what is there."""
    everyone = contenders(model, cllm, draft, heads, student, window)
    absent = {name: why for name, contender in everyone.items() if (why := contender.missing())}
    for name, why in absent.items():
        print(f"left out: {name}, since {why}", flush=True)
    present = {name: (str(one.model), one.settings) for name, one in everyone.items() if name not in absent}
    settings = {name: {"max_new_tokens": max_new_tokens, **own} for name, (_, own) in present.items()}
    for name, (source, _) in present.items():
        loaded(source, device).decoder(**settings[name])  # what cannot be is told before anything long
    judge, items = task_named(task), task_named(task).problems(split, count, data=data)
    jobs = [
        Job(name=name, run=partial(answered, source, device, settings[name], judge, items, batch_size))
        for name, (source, _) in present.items()
    ]
    asked = {
        "task": task, "data": str(data), "split": split, "problems": count, "longest answer": max_new_tokens,
        "batch size": batch_size,
        **{f"contender {name}": f"{source} {dict(own)}" for name, (source, own) in present.items()},
    }  # fmt: skip
    earlier = finished(folder / "answers")
    if not spread(lambda: jobs, folder / "answers", settings=asked):
        return
    print(f"answering {min(timed, count)} problems one by one, all in turn", flush=True)
    found = results(folder / "answers")
    for name in present.keys() - found.keys():
        absent[name] = f"it failed ({folder}/answers/{name}.failed says how)"
    if BASELINE in absent:
        raise FewstepError(f"{BASELINE} gave no answers, and everything is compared with it: {absent[BASELINE]}")
    names = [name for name in present if name in found]
    of = {name: loaded(present[name][0], device) for name in names}
    for name in names:
        check_made_by(of[name], found[name], result_path(folder / "answers", name))
    reports = {name: merge_reports([found[name]], {item.id: item for item in items}) for name in names}
    timings = time_interleaved(
        {name: partial(of[name].generate, **settings[name]) for name in names},
        [item.question for item in items[:timed]],
    )
    baseline = reports[BASELINE], timings[BASELINE]
    rows = [
        row_of(name, reports[name], timings[name], baseline, extra_parameters(of[name], settings[name], of[BASELINE]))
        for name in names
    ]
    kept = [name for name in names if name in earlier]
    told = {
        "command": this_command(),
        "machine": describe_machine(),
        "published": SOURCE,
        "left_out": absent,
        "answered_earlier": kept,
        "rows": rows,
    }
    write_json_whole(folder / "comparison.json", told)
    table = table_of(rows, absent, kept)
    with write_whole(folder / "comparison.md") as temporary:
        temporary.write_text(f"{table}\n", encoding="utf-8")
    print(table, flush=True)
    plot_speeds(rows, folder / "speeds")
    plot_accuracy({row["contender"]: [row] for row in rows}, folder / "accuracy")


if __name__ == "__main__":
    run_recipe(app)
