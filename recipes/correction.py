"""Correction of English by networks of every role, each trained for the same time; see docs/correction.md.

    python recipes/correction_data.py ...                                    sentences, tokenizer and problems
    python recipes/correction.py tables runs/correction-data runs/correction      token tables: with workers, on a CPU
    python recipes/correction.py train causal runs/correction --seconds 400
    python recipes/correction.py train teacher-long runs/correction --seconds 400
    python recipes/correction.py train teacher runs/correction --seconds 200
    python recipes/correction.py train student runs/correction --seconds 200
    python recipes/correction.py train embedding runs/correction --seconds 200
    python recipes/correction.py measure runs/correction-data runs/correction

The student and the network in embedding space begin with `teacher`, whose time is a part of theirs; `teacher-long` and
the causal model are trained as long as these in all.
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from correction_data import MOST_TOKENS, read_sentences
from safetensors.torch import load_file, save_file
from stages import device, gpu_settings, is_there
from transformers import LlamaConfig, LlamaForCausalLM

from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.files import write_whole
from fewstep.measure.contenders import figure, markdown_table
from fewstep.measure.metrics import chrf_interval, paired_interval, wilson_interval
from fewstep.measure.timing import time_interleaved, write_figures
from fewstep.models.embedding_model import to_embedding_space
from fewstep.models.load import load_network, load_tokenizer
from fewstep.models.network import Network
from fewstep.models.roles import Role
from fewstep.models.text import encode_completion
from fewstep.tasks.problems import Problem
from fewstep.tasks.registry import task_named
from fewstep.tasks.text_errors import TextErrors
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.collect import collect, decode_with, distribution_of, teacher_of
from fewstep.train.documents import CanvasLengths
from fewstep.train.embedding import EmbeddingObjective, EmbeddingSettings, trained_space, warp_by_loss
from fewstep.train.examples import Examples, encode_rows
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective, Objective
from fewstep.train.records import PromptRow
from fewstep.train.trainer import train as run_training
from fewstep.train.trajectories import read_table

BLOCK = 32
CANVAS = CanvasLengths(block_size=BLOCK, weights=(0.2, 0.5, 0.3))
ROOM = 64  # the canvas of answers of up to MOST_TOKENS tokens, in whole blocks
ROWS_PER_PART = 50_000
FIRST_SEED = 100  # of the errors to train on; 0 and 1 are those of the tokenizer and of the problems
PROBE_STEPS = 60

app = typer.Typer(pretty_exceptions_enable=False)
Data = Annotated[Path, typer.Argument(help="what recipes/correction_data.py made")]
Runs = Annotated[Path, typer.Argument(help="folder for everything that this recipe makes")]
Made = Callable[[int], Objective]
"""An objective for so many steps."""


# --- token tables ---


def _table(task: tuple[Path, Path, list[str], int]) -> None:
    path, tokenizer, texts, seed = task
    if path.exists():
        return
    torch.set_num_threads(1)
    rows = ({"prompt": TextErrors().mistype(text, seed).text, "completion": text} for text in texts)
    longest = MOST_TOKENS + 1
    examples = encode_rows(
        enumerate(rows, start=1), load_tokenizer(tokenizer), max_prompt=BLOCK + longest, max_completion=longest
    )
    with write_whole(path) as temporary:
        save_file(examples.tensors(), temporary)


@app.command()
def tables(
    data: Data,
    runs: Runs,
    copies: Annotated[int, typer.Option(help="times that each sentence comes, with other errors", min=1)] = 8,
    sentences: Annotated[int | None, typer.Option(help="of the training part; by default all", min=1)] = None,
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Put errors into the sentences, and make tables of tokens."""
    clean = read_sentences(data, "train")[:sentences]
    (runs / "tables").mkdir(parents=True, exist_ok=True)
    parts = [clean[i : i + ROWS_PER_PART] for i in range(0, len(clean), ROWS_PER_PART)]
    tasks = [
        (runs / "tables" / f"{copy:02d}-{i:03d}.safetensors", data / "tokenizer", part, FIRST_SEED + copy)
        for copy in range(copies)
        for i, part in enumerate(parts)
    ]
    with Pool(min(workers, len(tasks))) as pool:
        for _ in pool.imap_unordered(_table, tasks):
            pass
    load_tokenizer(data / "tokenizer").save_pretrained(runs / "tokenizer")
    print(f"{copies * len(clean):,} rows", flush=True)


def read_tables(runs: Path) -> Examples:
    files = sorted((runs / "tables").glob("*.safetensors"))
    if not files:
        raise FewstepError(f"{runs} holds no tables; make them with: correction.py tables")
    return Examples.joined([Examples(**load_file(file), origins=()) for file in files])


# --- training ---


def fresh_network(runs: Path, width: int, layers: int) -> Network:
    """With a width of 160 and 5 layers, 2.2 M parameters."""
    torch.manual_seed(0)
    tok = load_tokenizer(runs / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=width, intermediate_size=27 * width // 10 // 16 * 16, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id,
        bos_token_id=tok.bos_token_id,
    )  # fmt: skip
    network = LlamaForCausalLM(config).to(device())
    return Network(network, Role(name="autoregressive", block_size=BLOCK), tok, name="correction")


def fit(network: Network, made: Made, output: Path, seconds: float, **settings: Any) -> Network:
    """Train for about so many seconds: a few steps tell how long one takes. What is there already is left alone."""
    if is_there(output / "config.json"):
        return load_network(output, dtype="float32", device=device())
    if seconds <= 0:
        raise FewstepError(f"no time is left to train {output.name}; allow more --seconds")
    probe = gpu_settings(max_steps=PROBE_STEPS, log_every=PROBE_STEPS // 3, **settings)
    weights = {name: value.clone() for name, value in network.module.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        told = run_training(network, made(PROBE_STEPS), probe, Path(folder) / "probe")
    network.module.load_state_dict(weights)
    rates = [line["tokens_per_second"] for line in told.history if "tokens_per_second" in line]
    each_s = told.real_tokens / PROBE_STEPS / rates[-1]  # the first steps compile
    steps = max(1, int(seconds / each_s))
    print(f"{output.name}: {steps} steps of {1000 * each_s:.1f} ms", flush=True)
    warm = gpu_settings(max_steps=steps, warmup_steps=min(200, steps), log_every=max(1, steps // 20), **settings)
    run_training(network, made(steps), warm, output)
    return load_network(output, dtype="float32", device=device())


def masked(network: Network) -> Network:
    """In the role of a masked teacher, that reads a token from the row before it."""
    mask = network.tokenizer.mask_token_id
    return network.with_role(replace(network.role, name="bidirectional", mask_token_id=mask, right_shift_logits=True))


def train_causal(runs: Path, network: Network, data: Examples, seconds: float, **settings: Any) -> None:
    fit(network, lambda _: CausalObjective(network.role, data, network.eos_token_id), runs / "causal", seconds,
        **settings)  # fmt: skip


def train_teacher(
    runs: Path, network: Network, data: Examples, seconds: float, *, name: str = "teacher", **settings: Any
) -> None:
    network = masked(network)

    def made(_: int) -> Objective:
        return MaskedDiffusionObjective(network.role, data, network.eos_token_id, canvas=CANVAS)

    fit(network, made, runs / name, seconds, **settings)


def train_student(
    runs: Path, network: Network, data: Examples, seconds: float, *, prompts: int, **settings: Any
) -> None:
    """The teacher decodes some prompts, and the student learns from how; all of this is its time."""
    started_s = time.perf_counter()
    lm = LanguageModel(network)
    few = data.head(prompts)
    asked = [
        PromptRow(str(i), few.prompt_ids[a:b].tolist(), few.completion_ids[c:d].tolist())
        for i, ((a, b), (c, d)) in enumerate(
            zip(_spans(few.prompt_offsets), _spans(few.completion_offsets), strict=True)
        )
    ]
    top = distribution_of(network)
    decoding = decode_with(
        network, lm.decoder(max_new_tokens=ROOM), max_new_tokens=ROOM, batch_size=512, distribution=top
    )
    collect(
        decoding, asked, runs / "trajectories", teacher=teacher_of(network), distribution=top, settings={"gaps": None}
    )
    table, references = read_table(runs / "trajectories", teacher=network)
    student = network.with_role(network.role.playing("block_causal"))

    def made(_: int) -> Objective:
        losses = CDLMSettings(denoising=1.0)
        return CDLMObjective(student.role, table, student.eos_token_id, references=references, settings=losses)

    fit(student, made, runs / "student", seconds - (time.perf_counter() - started_s), **settings)


def _spans(offsets: torch.Tensor) -> Iterator[tuple[int, int]]:
    return pairwise(offsets.tolist())


def train_embedding(runs: Path, network: Network, data: Examples, seconds: float, **settings: Any) -> None:
    """Three fifths of the time to denoise, two to take long steps."""
    network = to_embedding_space(network)
    network = to_embedding_space(network, warp=warp_by_loss(network, data, count=256))
    for name, share, learnt in (
        ("denoiser", 0.6, EmbeddingSettings()),
        ("embedding", 0.4, EmbeddingSettings(objective="shortcut")),
    ):
        space = network.role.embedding_space
        assert space is not None
        network = network.with_role(replace(network.role, embedding_space=trained_space(space, learnt)))

        def made(steps: int, network: Network = network, learnt: EmbeddingSettings = learnt) -> Objective:
            return EmbeddingObjective(network, data, num_batches=steps, settings=learnt, canvas=CANVAS)

        network = fit(network, made, runs / name, share * seconds, **settings)


TRAININGS: dict[str, Callable[..., None]] = {
    "causal": train_causal,
    "teacher": train_teacher,
    "teacher-long": partial(train_teacher, name="teacher-long"),
    "student": train_student,
    "embedding": train_embedding,
}
FROM_TEACHER = ("student", "embedding")


@app.command()
def train(
    name: Literal["causal", "teacher", "teacher-long", "student", "embedding"],
    runs: Runs,
    seconds: Annotated[float, typer.Option(help="of training, that of the teacher not included")] = 240,
    width: Annotated[int, typer.Option(min=32)] = 160,
    layers: Annotated[int, typer.Option(min=1)] = 5,
    rows: Annotated[int, typer.Option(help="packed rows of a step", min=1)] = 32,
    row_length: Annotated[int, typer.Option(min=256)] = 1024,
    learning_rate: float = 2e-3,
    average: Annotated[float, typer.Option(help="decay of the averaged weights, which are kept; 0: none")] = 0.999,
    prompts: Annotated[int, typer.Option(help="that the teacher answers for the student", min=1)] = 40_000,
    seed: int = 0,
) -> None:
    """Train one of the networks for a time."""
    settings: dict[str, Any] = {
        "rows": rows,
        "row_length": row_length,
        "learning_rate": learning_rate,
        "seed": seed,
        "ema_decay": average or None,
    }
    network = (
        load_network(runs / "teacher", dtype="float32", device=device())
        if name in FROM_TEACHER
        else fresh_network(runs, width, layers)
    )
    asked = {"prompts": prompts} if name == "student" else {}
    TRAININGS[name](runs, network, read_tables(runs), seconds, **asked, **settings)


# --- measuring ---

BASELINE = "causal, KV cache"
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("causal", {}),
    "causal, prompt lookup": ("causal", {"decoder": "prompt-lookup"}),
    "causal, jacobi": ("causal", {"decoder": "jacobi"}),
    "teacher, one token a pass": ("teacher-long", {}),
    **{
        f"teacher, {steps} passes": ("teacher-long", {"steps": steps, "block_size": ROOM}) for steps in (16, 8, 4, 2, 1)
    },
    **{f"student, threshold {share}": ("student", {"threshold": share}) for share in (0.9, 0.7, 0.5, 0.3)},
    **{f"denoiser, {steps} passes": ("denoiser", {"steps": steps}) for steps in (32, 4, 1)},
    **{f"embedding, {steps} passes": ("embedding", {"steps": steps}) for steps in (16, 8, 4, 2, 1)},
}


def _interval(form: str, name: str, factor: float = 1.0) -> Callable[[Mapping[str, Any]], str]:
    """The cell of a figure with its interval; empty if it is not there."""

    def cell(row: Mapping[str, Any]) -> str:
        return "" if row[name] is None else form.format(*(factor * value for value in row[name]))

    return cell


COLUMNS = {
    "": lambda row: row["contender"],
    "restored, %": _interval("{:.1f} ({:.1f} to {:.1f})", "restored", 100),
    "more than causal": _interval("{:+.1f} ({:+.1f} to {:+.1f})", "difference", 100),
    "chrF": _interval("{:.2f} ({:.2f} to {:.2f})", "chrf"),
    "with errors: restored, %": figure(".1f", "percent_of_wrong"),
    "without: left alone, %": figure(".1f", "percent_of_right"),
    "passes": figure(".1f", "num_forwards_mean"),
    "seconds, 40 tokens": figure(".4f", "timing", "seconds_median"),
    "times as fast": figure(".1f", "speed_ratio"),
}


def judged(texts: Sequence[str], problems: Sequence[Problem], baseline: list[bool] | None) -> dict[str, Any]:
    """How many sentences are restored, of those with errors and of those without, and how many more than by another."""
    task = task_named("correction")
    right = [task.is_correct(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
    wrong = [problem.question != problem.answer for problem in problems]

    def percent(kind: bool) -> float | None:
        of_kind = [one for one, is_wrong in zip(right, wrong, strict=True) if is_wrong is kind]
        return 100 * sum(of_kind) / len(of_kind) if of_kind else None

    share = wilson_interval(sum(right), len(right))
    chrf = chrf_interval(texts, [problem.answer for problem in problems])
    more = None if baseline is None else paired_interval(right, baseline)
    return {
        "n": len(problems),
        "right": right,
        "restored": [share.estimate, share.low, share.high],
        "difference": None if more is None else [more.estimate, more.low, more.high],
        "chrf": [chrf.estimate, chrf.low, chrf.high],
        "percent_of_wrong": percent(True),
        "percent_of_right": percent(False),
    }


@app.command()
def measure(
    data: Data,
    runs: Runs,
    results: Annotated[Path, typer.Option(help="folder for the figures")] = Path("results/correction"),
    count: Annotated[int, typer.Option(help="problems of each part", min=1)] = 2_000,
    part: list[str] = ["test", "unseen"],  # noqa: B006
    timed: Annotated[int, typer.Option(help="sentences of about 40 tokens, one by one on the CPU", min=0)] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Exact restoration, chrF and passes of every network that is there, and seconds on the CPU, all in turn."""
    there = {name: place for name, place in CONTENDERS.items() if (runs / place[0] / "config.json").exists()}
    folders = {folder for folder, _ in there.values()}
    models = {folder: load(runs / folder) for folder in folders}
    timings: dict[str, Any] = {}
    for name in part:
        problems = task_named("correction").problems(n=count, data=data / f"{name}-problems.jsonl")
        questions = [problem.last_turn for problem in problems]
        if timed and not timings:
            on_cpu = {folder: load(runs / folder, dtype="float32", device="cpu") for folder in folders}
            tok = next(iter(on_cpu.values())).network.tokenizer
            fitting = [one for one in problems if 36 <= len(encode_completion(tok, one.answer)) <= 44][:timed]
            takers = {
                contender: partial(on_cpu[folder].generate, max_new_tokens=ROOM, **settings)
                for contender, (folder, settings) in there.items()
            }
            timings = time_interleaved(takers, [problem.last_turn for problem in fitting])
        rows: list[dict[str, Any]] = [{"contender": "left as it is", **judged(questions, problems, None)}]
        baseline: list[bool] | None = None
        for contender, (folder, settings) in there.items():
            outputs = models[folder].generate(questions, batch_size=batch_size, max_new_tokens=ROOM, **settings)
            row = {"contender": contender, **judged([one.text for one in outputs], problems, baseline)}
            row["num_forwards_mean"] = sum(one.num_forwards for one in outputs) / len(outputs)
            if contender == BASELINE:
                baseline = row["right"]
            if BASELINE in timings:
                base, mine = timings[BASELINE], timings[contender]
                row |= {"timing": mine.to_json(), "speed_ratio": sum(base.seconds) / sum(mine.seconds)}
            rows.append(row)
            print(f"{name}: {contender}: {row['restored'][0]:.1%}", flush=True)
        print(markdown_table(rows, COLUMNS), flush=True)
        write_figures(results / f"{name}.json", {"rows": rows})


if __name__ == "__main__":
    run_recipe(app)
