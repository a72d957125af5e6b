"""Are the decoders that verify guesses lossless? Their tokens beside those of plain autoregressive decoding.

    python recipes/lossless.py --problems 200

At temperature 0 and in float32 every one of them must give the very same tokens, on any weights: here the causal model,
the model of consistency training, and the teacher's weights with causal attention, which were never trained for it.
Guesses come from wherever they come, here a draft is the model beside and Medusa heads are untrained: bad guesses cost
passes, not tokens.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from run_recipe import run_recipe
from task_options import Many, TaskData, TaskName, TaskSplit

from fewstep.engine.language_model import load
from fewstep.measure.agreement import same_answers
from fewstep.measure.contenders import figure, markdown_table
from fewstep.measure.timing import write_figures
from fewstep.models.medusa import MedusaHeads, save_heads
from fewstep.tasks.registry import task_named

app = typer.Typer(pretty_exceptions_enable=False)
MODELS = ("gsm-ar", "gsm-cllm", "gsm-teacher", "gsm-draft")
COLUMNS = {
    "model": lambda row: row["model"],
    "decoder": lambda row: row["decoder"],
    "the same": lambda row: f"{row['same']} of {row['n']}",
    "tokens per pass": figure(".2f", "tokens_per_forward"),
}

DRAFTER: dict[str, dict[str, Any]] = {
    "autoregressive": {"decoder": "autoregressive"},
    **{f"self-speculative, {cycle}": {"cycle": cycle} for cycle in ("two-pass", "fused", "auto")},
}
"""What is compared of a model with a gated adapter."""


def settings_of(draft: str, heads: Path) -> dict[str, dict[str, Any]]:
    """What is compared, by name."""
    return {
        "autoregressive": {"decoder": "autoregressive"},
        "jacobi": {"decoder": "jacobi"},
        "jacobi, fixed windows": {"decoder": "jacobi", "fixed_windows": True},
        "lookahead": {"decoder": "lookahead"},
        "prompt-lookup": {"decoder": "prompt-lookup"},
        "speculative": {"decoder": "speculative", "draft": draft},
        "speculative, block student": {"decoder": "speculative", "draft": "gsm-student"},
        "medusa": {"decoder": "medusa", "heads": str(heads)},
    }


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="folder for lossless.json")] = Path("results/decoders"),
    model: Annotated[list[str], typer.Option(help="each in the causal role")] = list(MODELS),  # noqa: B006
    task: TaskName = "gsm-symbolic",
    data: TaskData = None,
    split: TaskSplit = None,
    count: Annotated[int, typer.Option("--problems", min=1, help="of the task")] = 200,
    batch_size: Many = 50,
    max_new_tokens: Many = 128,
    device: str = "auto",
) -> None:
    """Compare, and end with exit code 1 if any answer differs."""
    questions = [item.question for item in task_named(task).problems(split, count, data=data)]
    rows = []
    for name in model:
        lm = load(name, role="autoregressive", dtype="float32", device=device)
        draft = next(other for other in ("gsm-ar", "gsm-cllm") if other != name)
        with tempfile.TemporaryDirectory() as folder:
            if lm.network.adapter is None:
                save_heads(MedusaHeads.of(lm.network, 3), Path(folder) / "heads", lm.network)
                compared = settings_of(draft, Path(folder) / "heads")
            else:
                compared = DRAFTER
            outputs = {
                decoder: lm.generate(questions, batch_size=batch_size, max_new_tokens=max_new_tokens, **settings)
                for decoder, settings in compared.items()
            }
        expected = outputs.pop("autoregressive")
        of_model = [
            {"model": name, "decoder": decoder, **same_answers(answers, expected)}
            for decoder, answers in outputs.items()
        ]
        print(markdown_table(of_model, COLUMNS), flush=True)
        rows += of_model
    write_figures(results / "lossless.json", {"rows": rows})
    raise typer.Exit(int(any(row["same"] < row["n"] for row in rows)))


if __name__ == "__main__":
    run_recipe(app)
