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

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from correction_data import MOST_TOKENS, rows_in_parts
from stages import device, gpu_settings, is_there

from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.measure.contenders import figure, markdown_table, with_interval
from fewstep.measure.restoration import restoration
from fewstep.measure.timing import time_interleaved, write_figures
from fewstep.models.embedding_denoiser import to_embedding_space
from fewstep.models.fresh import fresh_network
from fewstep.models.load import load_network, load_tokenizer
from fewstep.models.network import Network
from fewstep.models.text import encode_completion
from fewstep.tasks.prose import SentenceFolder
from fewstep.tasks.registry import task_named
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.collect import collect_top
from fewstep.train.documents import CanvasLengths
from fewstep.train.embedding import EmbeddingObjective, EmbeddingSettings, begin_embedding, warp_by_loss
from fewstep.train.examples import Examples
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective, Objective
from fewstep.train.records import prompts_of
from fewstep.train.timed import train_for
from fewstep.train.token_tables import Limits, read_tables, write_tables
from fewstep.train.trajectories import read_table

BLOCK = 32
CANVAS = CanvasLengths(block_size=BLOCK, weights=(0.2, 0.5, 0.3))
ROOM = 64  # the canvas of answers of up to MOST_TOKENS tokens, in whole blocks
MOST_STEPS = 1_000_000

app = typer.Typer(pretty_exceptions_enable=False)
Data = Annotated[Path, typer.Argument(help="what recipes/correction_data.py made")]
Runs = Annotated[Path, typer.Argument(help="folder for everything that this recipe makes")]
Made = Callable[[int], Objective]
"""An objective for so many steps."""


@app.command()
def tables(
    data: Data,
    runs: Runs,
    copies: Annotated[int, typer.Option(help="times that each sentence comes, with other errors", min=1)] = 8,
    sentences: Annotated[int | None, typer.Option(help="of the training part; by default all", min=1)] = None,
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Put errors into the sentences, and make tables of tokens."""
    clean = SentenceFolder(data).read("train")[:sentences]
    parts = {runs / "tables" / f"{name}.safetensors": rows for name, rows in rows_in_parts(clean, copies).items()}
    limits = Limits(prompt=BLOCK + MOST_TOKENS + 1, completion=MOST_TOKENS + 1)
    write_tables(parts, data / "tokenizer", limits, workers=workers)
    load_tokenizer(data / "tokenizer").save_pretrained(runs / "tokenizer")
    print(f"{copies * len(clean):,} rows", flush=True)


# --- training ---


def fit(network: Network, made: Made, output: Path, seconds: float, **settings: Any) -> Network:
    """Train for about so many seconds. What is there already is left alone."""
    if not is_there(output / "config.json"):
        train_for(seconds, network, made, gpu_settings(max_steps=MOST_STEPS, warmup_steps=200, **settings), output)
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
    collect_top(
        network, LanguageModel(network).decoder(max_new_tokens=ROOM), prompts_of(data.head(prompts)),
        runs / "trajectories", max_new_tokens=ROOM, batch_size=512, settings={"gaps": None},
    )  # fmt: skip
    table, references = read_table(runs / "trajectories", teacher=network)
    student = network.with_role(network.role.playing("block_causal"))

    def made(_: int) -> Objective:
        losses = CDLMSettings(denoising=1.0)
        return CDLMObjective(student.role, table, student.eos_token_id, references=references, settings=losses)

    fit(student, made, runs / "student", seconds - (time.perf_counter() - started_s), **settings)


def train_embedding(runs: Path, network: Network, data: Examples, seconds: float, **settings: Any) -> None:
    """Three fifths of the time to denoise, two to take long steps."""
    network = to_embedding_space(network)
    network = to_embedding_space(network, warp=warp_by_loss(network, data, count=256))
    for name, share, learnt in (
        ("denoiser", 0.6, EmbeddingSettings()),
        ("embedding", 0.4, EmbeddingSettings(objective="shortcut")),
    ):
        network = begin_embedding(network, learnt)

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
    if name in FROM_TEACHER:
        network = load_network(runs / "teacher", dtype="float32", device=device())
    else:
        tok = load_tokenizer(runs / "tokenizer")
        shape = {"width": width, "layers": layers, "max_positions": 256, "block_size": BLOCK}
        network = fresh_network(tok, **shape, device=device(), name="correction")
    asked = {"prompts": prompts} if name == "student" else {}
    data = read_tables(runs / "tables")
    if data is None:
        raise FewstepError(f"{runs} holds no tables; make them with: correction.py tables")
    TRAININGS[name](runs, network, data, seconds, **asked, **settings)


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


COLUMNS = {
    "": lambda row: row["contender"],
    "restored, %": with_interval(".1f", "restored", 100),
    "more than causal": with_interval("+.1f", "difference", 100),
    "chrF": with_interval(".2f", "chrf"),
    "with errors: restored, %": figure(".1f", "percent_of_wrong"),
    "without: left alone, %": figure(".1f", "percent_of_right"),
    "passes": figure(".1f", "num_forwards_mean"),
    "seconds, 40 tokens": figure(".4f", "timing", "seconds_median"),
    "times as fast": figure(".1f", "speed_ratio"),
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
        rows: list[dict[str, Any]] = [{"contender": "left as it is", **restoration(questions, problems)}]
        baseline: list[bool] | None = None
        for contender, (folder, settings) in there.items():
            outputs = models[folder].generate(questions, batch_size=batch_size, max_new_tokens=ROOM, **settings)
            row = {"contender": contender, **restoration([one.text for one in outputs], problems, baseline)}
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
