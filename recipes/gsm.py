"""The bundled models, from data to student.

    python recipes/gsm.py STAGE                                   on a CPU or one GPU
    torchrun --nproc-per-node 2 recipes/gsm.py STAGE              on two

Stages, in order: `data` (rendered problems as token tables), `ar` (a causal model from scratch), `teacher` (the causal
model adapted to masked diffusion), `trajectories` (the teacher's decoding), `student` (CDLM), `bundle`. Each writes a
folder under --runs; what is there is left alone, and training that was interrupted resumes. `problems` makes the
bundled problem files.
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from pipeline import CausalFromScratch, Student, Tables, Teacher, Trajectories

from fewstep.cli.settings_commands import app_of
from fewstep.errors import FewstepError
from fewstep.files import write_text_whole
from fewstep.json_files import read_json, write_json_whole
from fewstep.models.load import load_network, save_network
from fewstep.models.names import BUNDLED
from fewstep.tasks.gsm_symbolic import write_problem_files
from fewstep.train.cdlm import CDLMSettings

RUNS = Path("runs/gsm")
app = app_of({
    "data": Tables(runs=RUNS, tokenizer=BUNDLED / "gsm-tokenizer", examples=3_000_000, workers=32),
    "ar": CausalFromScratch(
        runs=RUNS, name="gsm-ar", steps=3000, rows=48, learning_rate=2e-3, warmup_steps=200, log_every=100, dev=500
    ),
    "teacher": Teacher(
        runs=RUNS, source="gsm-ar", name="gsm-teacher", steps=3000, rows=48, learning_rate=1.5e-3, warmup_steps=100,
        log_every=100, dev=200,
    ),
    "trajectories": Trajectories(runs=RUNS, source="gsm-teacher", name="trajectories", prompts=8192, seed=7),
    "student": Student(
        runs=RUNS, source="gsm-teacher", name="gsm-student", steps=400, rows=96, learning_rate=1.5e-3,
        warmup_steps=30, rank=32, losses=CDLMSettings(denoising=0.1), dev=500,
    ),
})  # fmt: skip


@app.command("problems")
def problem_files(folder: Path = BUNDLED / "gsm-symbolic") -> None:
    """Make the bundled problem files again: the same bytes with the same reasoning-gym."""
    write_problem_files(folder)


@app.command()
def bundle(
    source: Path,
    name: str,
    base: Annotated[str, typer.Option(help="the bundled model under an adapter")] = "gsm-teacher",
    threshold: Annotated[float | None, typer.Option(help="a student's, chosen on development problems")] = None,
    gaps: Annotated[int | None, typer.Option(help="a student's, chosen likewise")] = None,
    block_size: Annotated[int | None, typer.Option(help="a teacher's in decoding, chosen likewise")] = None,
) -> None:
    """Put a finished model among those that ship with the package: one bfloat16 file, or the adapter."""
    if not (source / "config.json").exists():
        raise FewstepError(f"{source} holds no finished model")
    target = BUNDLED / name
    target.mkdir(exist_ok=True)
    if (source / "adapter_config.json").exists():
        for path in source.iterdir():
            if path.is_file() and path.name not in ("README.md", "report.json"):
                shutil.copy(path, target / path.name)
        _change(target / "adapter_config.json", base_model_name_or_path=f"../{base}")
    else:
        save_network(load_network(source, dtype="bfloat16", device="cpu"), target)
    # Without white space a table of tokens is less than half as long.
    table = target / "tokenizer.json"
    write_text_whole(table, json.dumps(read_json(table), ensure_ascii=False, separators=(",", ":")))
    chosen = {"threshold": threshold, "gaps": gaps, "block_size": block_size}
    _change(target / "config.json", **{key: value for key, value in chosen.items() if value is not None})


def _change(path: Path, **values: Any) -> None:
    """Set these keys of a JSON file."""
    write_json_whole(path, {**read_json(path), **values})


if __name__ == "__main__":
    run_recipe(app)
