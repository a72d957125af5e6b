"""One set of weights, several roles: size, accuracy, tokens per pass and speed of each, as a table.

    python recipes/roles.py --results results/roles

Each base is loaded once, and plays every role by `with_adapter`. Adapters that are not there are left out.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from run_recipe import run_recipe

from fewstep.engine.language_model import LanguageModel, load
from fewstep.measure.contenders import figure, markdown_table
from fewstep.measure.evaluate import evaluate
from fewstep.measure.timing import time_interleaved, write_figures
from fewstep.models.names import BUNDLED
from fewstep.models.network import added_bytes
from fewstep.tasks.registry import task_named

app = typer.Typer(pretty_exceptions_enable=False)
COLUMNS = {
    "model": lambda row: f"`{row['model']}`",
    "role": lambda row: f"{row['role']}, {row['decoder']}",
    "MB added in memory": figure(".1f", "megabytes_added"),
    "solved": figure(".1%", "accuracy"),
    "interval": lambda row: "{:.1%} to {:.1%}".format(*row["accuracy_ci95"]),
    "tokens per pass": figure(".2f", "tokens_per_forward"),
    "seconds, median": figure(".3f", "timing", "seconds_median"),
    "ms per pass": figure(".1f", "timing", "step_ms"),
}


def roles_of(families: list[str], device: str) -> dict[str, LanguageModel]:
    """Name -> model; a family is a base and its adapters, with commas between them."""
    models = {}
    for family in families:
        base, *adapters = family.split(",")
        models[base] = load(base, device=device)
        for name in adapters:
            if (BUNDLED / name).exists() or Path(name).exists():
                models[name] = models[base].with_adapter(name)
    return models


@app.command()
def main(
    results_folder: Annotated[Path, typer.Option("--results")] = Path("results/roles"),
    family: list[str] = ["gsm-ar,gsm-cllm,gsm-draft", "gsm-teacher,gsm-student"],  # noqa: B006
    count: Annotated[int, typer.Option("--problems", help="test problems, for accuracy and tokens per pass")] = 1_000,
    timed: Annotated[int, typer.Option(help="of them, for seconds one by one")] = 10,
    batch_size: int = 100,
    device: str = "auto",
) -> None:
    """Measure every role, write roles.json, and print the rows of the table."""
    problems = task_named("gsm-symbolic").problems("test", count)
    models = roles_of(family, device)
    known: set[int] = set()
    rows: list[dict[str, Any]] = []
    for name, lm in models.items():
        report = evaluate(lm, problems, batch_size=batch_size).to_json()
        rows.append({**report, "model": name, "megabytes_added": added_bytes(lm.network, known) / 1e6})
        print(f"{name}: {report['accuracy']:.1%}", flush=True)
    questions = [problem.question for problem in problems[:timed]]
    timings = time_interleaved({name: lm.generate for name, lm in models.items()}, questions)
    rows = [{**row, "timing": timings[row["model"]].to_json()} for row in rows]
    print(markdown_table(rows, COLUMNS))
    write_figures(results_folder / "roles.json", {"rows": rows})


if __name__ == "__main__":
    run_recipe(app)
