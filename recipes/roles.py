"""One set of weights, several roles: size, accuracy, tokens per pass and speed of each, as a table.

    python recipes/roles.py --results results/roles

Each base is loaded once, and plays every role by `with_adapter`. Adapters that are not there are left out.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from run_recipe import run_recipe

from fewstep.engine.language_model import LanguageModel, load
from fewstep.json_files import write_json_whole
from fewstep.measure.evaluate import evaluate
from fewstep.measure.timing import describe_machine, this_command, time_interleaved
from fewstep.models.names import BUNDLED
from fewstep.tasks.registry import task_named

app = typer.Typer(pretty_exceptions_enable=False)


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


def added_megabytes(lm: LanguageModel, known: set[int]) -> float:
    """Megabytes of its parameters that no model before it has in memory; they are known from now on."""
    parameters = [
        *lm.network.module.parameters(),
        *([] if lm.network.adapter is None else lm.network.adapter.parameters()),
    ]
    new = {one.data_ptr(): one.nbytes for one in parameters if one.data_ptr() not in known}
    known.update(new)
    return sum(new.values()) / 1e6


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
        rows.append({**report, "model": name, "megabytes_added": added_megabytes(lm, known)})
        print(f"{name}: {report['accuracy']:.1%}", flush=True)
    timings = time_interleaved(
        {name: lm.generate for name, lm in models.items()}, [problem.question for problem in problems[:timed]]
    )
    print("| model | role | MB added in memory | solved, % | tokens per pass | seconds, median | ms per pass |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        timing = timings[row["model"]]
        row["timing"] = timing.to_json()
        low, high = (100 * end for end in row["accuracy_ci95"])
        print(
            f"| `{row['model']}` | {row['role']}, {row['decoder']} | {row['megabytes_added']:.1f} | "
            f"{100 * row['accuracy']:.1f} ({low:.1f}-{high:.1f}) | {row['tokens_per_forward']:.2f} | "
            f"{timing.seconds_median:.3f} | {timing.step_ms:.1f} |"
        )
    told = {"command": this_command(), "machine": describe_machine(), "rows": rows}
    write_json_whole(results_folder / "roles.json", told)


if __name__ == "__main__":
    run_recipe(app)
