"""Every way to decode a causal model in fewer passes, side by side: a table and a plot.

    python recipes/compare_decoders.py --heads runs/cllm/medusa --draft runs/cllm/draft

The same problems are answered in a batch, which gives accuracy, passes and throughput, and then one by one, all
contenders taking turns at each, which gives the time of a pass and the tokens per second of a single answer. What needs
a model that is not there is left out, and the table says so. Answers in batches are kept with their throughput: a rerun
does what is missing and times all at batch 1 again. With several GPUs contenders share them, and throughput is that
beside the others.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from run_recipe import run_recipe
from task_options import Many, TaskData, TaskName, TaskSplit

from fewstep.errors import FewstepError
from fewstep.files import write_text_whole
from fewstep.measure.contenders import (
    Contender,
    answer_problems,
    figure,
    load_contenders,
    markdown_table,
    time_contenders,
)
from fewstep.measure.plots import plot_accuracy, plot_bars
from fewstep.measure.side_by_side import rows_beside
from fewstep.measure.timing import write_figures
from fewstep.models.names import bundled_names
from fewstep.tasks.registry import task_named

app = typer.Typer(pretty_exceptions_enable=False)

BASELINE = "autoregressive"
SOURCE = "arXiv 2403.00835, LLaMA2-7B on GSM8K, quoted second-hand"
PUBLISHED = {
    BASELINE: {"tokens_per_second": 43.5, "speed_ratio": 1.0, "accuracy": 0.591},
    "jacobi": {"tokens_per_second": 45.7, "speed_ratio": 45.7 / 43.5},
    "lookahead": {"tokens_per_second": 74.8, "speed_ratio": 74.8 / 43.5},
    "CLLM": {"tokens_per_second": 132.4, "speed_ratio": 132.4 / 43.5, "accuracy": 0.564},
}
"""Rows of the published table, by our names for them."""

COLUMNS = {
    "decoder": lambda row: row["contender"],
    "tokens/pass": figure(".2f", "tokens_per_forward"),
    "ms/pass, batch 1": figure(".1f", "batch_1", "step_ms"),
    "tokens/s, batch 1": figure(".0f", "batch_1", "tokens_per_second"),
    "times as fast": figure(".2f", "speed_ratio"),
    "tokens/s, batched": figure(".0f", "tokens_per_second"),
    "solved": figure(".1%", "accuracy"),
    "same answers": figure(".1%", "same_answers"),
    "extra parameters": lambda row: f"{row['extra_parameters'] / 1e6:.2f} M",
    "published tokens/s": figure(".1f", "published", "tokens_per_second"),
    "published speed": figure(".1f", "published", "speed_ratio"),
    "published solved": figure(".1%", "published", "accuracy"),
}
BARS = {"tokens_per_forward": "tokens per pass", "speed_ratio": "times as fast as one token a pass, batch 1"}


def missing(option: str, value: str | None) -> str:
    """Why what this option names is not there, or nothing."""
    if value is None:
        return f"--{option} was not given"
    is_there = option == "model" or Path(value).is_dir() or value in bundled_names()  # whose absence `load` tells
    return "" if is_there else f"{value} is neither a folder nor a bundled model"


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
    drafter: Annotated[str | None, typer.Option(help="a gated adapter on the model")] = "gsm-draft",
    window: Annotated[int, typer.Option(min=1, help="of the Jacobi decoder")] = 16,
    task: TaskName = "gsm-symbolic",
    data: TaskData = None,
    split: TaskSplit = None,
    count: Annotated[int, typer.Option("--problems", min=1, help="of the task, answered in batches")] = 1000,
    timed: Annotated[int, typer.Option(min=1, help="of them, answered one by one")] = 50,
    batch_size: Many = 64,
    max_new_tokens: Many = 256,
    device: str = "auto",
) -> None:
    """Compare what is there."""
    given = {"model": model, "cllm": cllm, "draft": draft, "heads": heads, "student": student, "drafter": drafter}
    sliding: dict[str, Any] = {"decoder": "jacobi", "window": window}
    published = {**sliding, "fixed_windows": True}
    declared: list[tuple[str, str, str, dict[str, Any]]] = [  # name, options of the model and of what else is needed
        (BASELINE, "model", "model", {"decoder": BASELINE}),
        ("jacobi", "model", "model", published),
        ("jacobi, sliding", "model", "model", sliding),
        ("lookahead", "model", "model", {"decoder": "lookahead"}),
        ("prompt-lookup", "model", "model", {"decoder": "prompt-lookup"}),
        ("medusa", "model", "heads", {"decoder": "medusa", "heads": heads}),
        ("speculative", "model", "draft", {"decoder": "speculative", "draft": draft}),
        ("speculative, block student", "model", "student", {"decoder": "speculative", "draft": student}),
        ("self-speculative, fused", "drafter", "drafter", {"decoder": "self-speculative", "cycle": "fused"}),
        ("self-speculative, two-pass", "drafter", "drafter", {"decoder": "self-speculative", "cycle": "two-pass"}),
        ("CLLM", "cllm", "cllm", published),
        ("CLLM, sliding", "cllm", "cllm", sliding),
        ("CLLM, sliding, twice as long", "cllm", "cllm", {**sliding, "window": 2 * window}),
        ("CLLM + lookahead", "cllm", "cllm", {"decoder": "lookahead"}),
        ("CLLM, one token a pass", "cllm", "cllm", {"decoder": BASELINE}),
        ("CDLM student", "student", "student", {}),
    ]
    absent = {name: why for name, _, needed, _ in declared if (why := missing(needed, given[needed]))}
    everyone = [
        Contender(name=name, model=str(given[which]), settings={"max_new_tokens": max_new_tokens, **settings})
        for name, which, _, settings in declared
        if name not in absent
    ]
    for name, why in absent.items():
        print(f"left out: {name}, since {why}", flush=True)
    models = load_contenders(everyone, device=device)
    judge, items = task_named(task), task_named(task).problems(split, count, data=data)
    found = answer_problems(
        everyone, models, {task: items}, folder / "answers", task=judge, batch_size=batch_size, texts=True
    )
    if found is None:
        return
    reports = found[task]
    absent |= {one.name: f"it failed ({folder}/answers says how)" for one in everyone if one.name not in reports}
    if BASELINE in absent:
        raise FewstepError(f"{BASELINE} gave no answers, and everything is compared with it: {absent[BASELINE]}")
    print(f"answering {min(timed, count)} problems one by one, all in turn", flush=True)
    present = [one for one in everyone if one.name in reports]
    timings = time_contenders(present, models, [item.question for item in items[:timed]])
    rows = rows_beside(BASELINE, present, models, reports, timings)
    rows = [{**row, "published": PUBLISHED.get(row["contender"])} for row in rows]
    earlier = [one.name for one in present if reports[one.name].num_kept]
    told = {"published": SOURCE, "left_out": absent, "answered_earlier": earlier, "rows": rows}
    write_figures(folder / "comparison.json", told)
    lines = [markdown_table(rows, COLUMNS), "", f"Published: {SOURCE}."]
    lines += [f"Left out: {name}, since {why}." for name, why in absent.items()]
    if earlier:
        lines.append(f"Answered in an earlier run, which their tokens/s in batches are of: {'; '.join(earlier)}.")
    table = "\n".join(lines)
    write_text_whole(folder / "comparison.md", f"{table}\n")
    print(table, flush=True)
    plot_bars(rows, BARS, folder / "speeds")
    plot_accuracy({row["contender"]: [row] for row in rows}, folder / "accuracy")


if __name__ == "__main__":
    run_recipe(app)
