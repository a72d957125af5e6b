"""The whole path in minutes on a CPU: a causal model, a diffusion teacher, its trajectories, a few-pass student.

    python recipes/speedrun.py                                    at most ten minutes on two idle cores

Interrupt it whenever you like: the same command goes on.

The task is made on the spot: put the letters of a word in order. A network of 0.13 M parameters learns it token by
token (causal), then to fill masked answers (teacher), and then, from the teacher's own decoding, to fill many masks in
one pass (student). All three answer the same words, which are not among those of the training.

On a GPU the same path makes the bundled models, on word problems: recipes/gsm.py.
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fewstep.engine.language_model import load
from fewstep.errors import FewstepError
from fewstep.json_files import read_json
from fewstep.measure.evaluate import evaluate
from fewstep.models.text import encode_completion
from fewstep.models.tiny import tiny_network
from fewstep.tasks.problems import Problem
from fewstep.tasks.scoring import EXACT
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.collect import collect_top
from fewstep.train.documents import CanvasLengths
from fewstep.train.examples import encode_rows
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective
from fewstep.train.records import PromptRow
from fewstep.train.trainer import TrainSettings, train
from fewstep.train.trajectories import read_table

BLOCK = 16  # an answer: 15 letters and the end
app = typer.Typer(pretty_exceptions_enable=False)


def rows(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Words of random letters, and their letters in order."""
    draw = random.Random(seed)
    for _ in range(count):
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=BLOCK - 1))
        yield {"prompt": word, "completion": "".join(sorted(word))}


def is_trained(folder: Path, steps: int) -> bool:
    """Whether an earlier run has finished this model. FewstepError if that took other steps."""
    if not (folder / "config.json").exists() or not (folder / "report.json").exists():
        return False
    if (made := read_json(folder / "report.json")["steps"]) != steps:
        raise FewstepError(f"{folder} holds a model of {made} steps, not {steps}; name another --output, or remove it")
    return True


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="a folder for what is made; what is finished there is kept")] = Path(
        "runs/speedrun"
    ),
    steps: Annotated[int, typer.Option(min=2, help="of the causal model and the teacher; the student's: half")] = 500,
    test: Annotated[int, typer.Option(min=1, help="words that all three answer")] = 200,
) -> None:
    """Train causal model, teacher and student, and print what each solves, in how many passes and seconds."""
    settings = TrainSettings(max_steps=steps, rows=8, row_length=512, learning_rate=3e-3, log_every=100)
    start = tiny_network("autoregressive", hidden=64, layers=3, heads=4, block_size=BLOCK, context_attention="causal")
    data = encode_rows(enumerate(rows(60 * steps, seed=1), start=1), start.tokenizer)
    if not is_trained(output / "causal", steps):
        train(start, CausalObjective(start.role, data, start.eos_token_id), settings, output / "causal")

    causal = load(output / "causal", dtype="float32").network
    role = replace(
        causal.role, name="bidirectional", mask_token_id=causal.tokenizer.mask_token_id, right_shift_logits=True
    )
    canvas = CanvasLengths(block_size=BLOCK, weights=(1.0,))
    objective = MaskedDiffusionObjective(role, data, causal.eos_token_id, canvas=canvas, canvases=3)
    if not is_trained(output / "teacher", steps):
        train(causal.with_role(role), objective, settings, output / "teacher")

    lm = load(output / "teacher", dtype="float32")
    prompts = [
        PromptRow(str(i), lm.encode(row["prompt"]), encode_completion(lm.network.tokenizer, row["completion"]))
        for i, row in enumerate(rows(2048, seed=2))
    ]
    collect_top(
        lm.network, lm.decoder(max_new_tokens=BLOCK), prompts, output / "trajectories", max_new_tokens=BLOCK,
        batch_size=512, settings={"gaps": None},
    )  # fmt: skip

    table, references = read_table(output / "trajectories", teacher=lm.network)
    student = lm.network.with_role(lm.role.playing("block_causal"))
    losses = CDLMSettings(denoising=1.0)
    cdlm = CDLMObjective(student.role, table, student.eos_token_id, references=references, settings=losses)
    if not is_trained(output / "student", steps // 2):
        train(student, cdlm, replace(settings, max_steps=steps // 2, learning_rate=1e-3), output / "student")

    problems = [Problem(str(i), row["prompt"], row["completion"]) for i, row in enumerate(rows(test, seed=3))]
    print(f"{'':9}{'solved':>8}{'passes':>8}{'tokens per pass':>17}{'median seconds':>16}")
    for name in ("causal", "teacher", "student"):
        model = load(output / name, dtype="float32")
        report = evaluate(model, problems, metric=EXACT, batch_size=1, max_new_tokens=BLOCK)
        passes, seconds = (report.to_json()[key] for key in ("num_forwards_mean", "seconds_median"))
        print(f"{name:9}{report.accuracy:8.1%}{passes:8.1f}{report.tokens_per_forward:17.2f}{seconds:16.4f}")


if __name__ == "__main__":
    run_recipe(app)
