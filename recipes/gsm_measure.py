"""The figures of the bundled models, and their cards: `python recipes/gsm_measure.py COMMAND`.

`accuracy` (many problems, spread over the visible GPUs; repeat it until all is done), `timing` (seconds at batch 1, on
a CPU or a GPU), `throughput` (training, on a GPU), then `cards`. Every result is a JSON file in the results folder as
soon as it is there.
"""

import json
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gsm_cards import Kind, Sources, card, comparison_sentence
from jobs import Job, results, spread
from torch import Tensor

from fewstep.decode.requests import Output
from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.files import read_json, write_json_whole, write_whole
from fewstep.measure.compare import Comparison, compare
from fewstep.measure.evaluate import Record, Report, evaluate
from fewstep.measure.gsm_symbolic import (
    BUNDLED_COUNTS,
    Problem,
    Split,
    make_problems,
    problems,
    read_problems,
    write_problem_file,
)
from fewstep.measure.plots import plot_accuracy
from fewstep.measure.timing import Timing, describe_machine, speed_factors, time_interleaved
from fewstep.models.load import BUNDLED, load_network
from fewstep.models.masks import Layout
from fewstep.models.network import Network
from fewstep.models.roles import RoleName
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.examples import Examples
from fewstep.train.lora import LoRASettings
from fewstep.train.objectives import CausalObjective, Corruption, MaskedDiffusionObjective, Objective
from fewstep.train.stream import BatchStream
from fewstep.train.trainer import TrainSettings, train
from fewstep.train.trajectory_table import read_table

app = typer.Typer(pretty_exceptions_enable=False)
Results = Annotated[Path, typer.Option("--results", help="folder for figures")]


def this_command() -> str:
    return f"python recipes/gsm_measure.py {shlex.join(sys.argv[1:])}"


# --- accuracy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """Names or folders of the three models."""

    ar: str = "gsm-ar"
    teacher: str = "gsm-teacher"
    student: str = "gsm-student"


@dataclass(frozen=True)
class Contender:
    """One model in one role with its settings. `limit`: on so many problems of a set only."""

    name: str
    model: str
    settings: Mapping[str, Any]
    role: RoleName | None = None
    limit: int | None = None


def contenders(
    models: Models,
    thresholds: Sequence[float],
    steps: Sequence[int],
    *,
    max_new_tokens: int = 256,
    published: int | None = None,
) -> list[Contender]:
    """All that the cards show, what matters most first.

    The published teacher (no early stop) answers as the stopping one, only slower; `published` limits its problems.
    """
    same = {"max_new_tokens": max_new_tokens}
    return [
        Contender("ar", models.ar, same),
        *(Contender(f"student-{value}", models.student, {**same, "threshold": value}) for value in thresholds),
        Contender("teacher", models.teacher, same),
        *(
            Contender(f"teacher-threshold-{value}", models.teacher, {**same, "threshold": value})
            for value in thresholds
        ),
        *(Contender(f"teacher-steps-{value}", models.teacher, {**same, "steps": value}) for value in steps),
        *(
            Contender(f"untrained-{value}", models.teacher, {**same, "threshold": value}, role="block_causal")
            for value in thresholds
        ),
        Contender("teacher-published", models.teacher, {**same, "early_stop": False}, limit=published),
    ]


@cache
def loaded(name: str, role: RoleName | None = None, device: str = "auto") -> LanguageModel:
    """Once a process."""
    return load(name, role=role, device=device)


def problem_set(split: Split, count: int, folder: Path) -> list[Problem]:
    """The first `count` problems: the bundled ones, or the file SPLIT.jsonl in `folder`, made with reasoning-gym."""
    if count <= BUNDLED_COUNTS[split]:
        return problems(split, count)
    path = folder / f"{split}.jsonl"
    if not path.exists() or len(read_problems(path)) < count:
        write_problem_file(path, make_problems(split, count))
    return read_problems(path, split=split)[:count]


def accuracy_jobs(
    sets: Mapping[str, Sequence[Problem]], everyone: Sequence[Contender], *, shard: int, batch_size: int
) -> list[Job]:
    """A job for each contender and each `shard` problems of a set; sets in the order given."""
    jobs = []
    for set_name, items in sets.items():
        for contender in everyone:
            wanted = items[: contender.limit]
            for start in range(0, len(wanted), shard):
                part = wanted[start : start + shard]
                jobs.append(
                    Job(
                        name=f"{set_name}--{contender.name}--{start:06d}",
                        run=partial(answer, contender, part, batch_size),
                    )
                )
    return jobs


def answer(contender: Contender, items: Sequence[Problem], batch_size: int) -> dict[str, Any]:
    """The report on these problems; records as columns, without the texts."""
    report = evaluate(loaded(contender.model, contender.role), items, batch_size=batch_size, **contender.settings)
    records = report.records
    return {
        "report": report.to_json(),
        "wall_seconds": report.wall_seconds,
        "ids": [record.id for record in records],
        "correct": "".join(str(int(record.correct)) for record in records),
        "num_tokens": [record.num_tokens for record in records],
        "num_forwards": [record.num_forwards for record in records],
        "seconds": [round(record.seconds, 4) for record in records],
        "machine": describe_machine(),
        "command": this_command(),
    }


def merged(shards: Sequence[Mapping[str, Any]], items: Mapping[str, Problem]) -> Report:
    """The shards of one contender as one report. Wall seconds add up, as on one device."""
    told = shards[0]["report"]
    records = [
        Record(
            id=name, template=items[name].template, answer=items[name].answer, text="", correct=mark == "1",
            num_tokens=tokens, num_forwards=forwards, seconds=seconds, finish_reason="",
        )
        for part in shards
        for name, mark, tokens, forwards, seconds in zip(
            part["ids"], part["correct"], part["num_tokens"], part["num_forwards"], part["seconds"], strict=True
        )
    ]  # fmt: skip
    shared = ("model", "role", "decoder", "engine", "task", "threshold", "steps", "batch_size", "dtype", "device")
    return Report(
        **{key: told[key] for key in shared},
        records=records,
        wall_seconds=sum(part["wall_seconds"] for part in shards),
        step_ms=statistics.median(part["report"]["step_ms"] for part in shards),
    )


def choose_threshold(dev: Mapping[str, Report], slack: float) -> float:
    """Of the student's thresholds, the one with most tokens per forward whose accuracy on development problems is at
    most `slack` below the teacher's; if none is, the most accurate.
    """
    swept = [report for name, report in dev.items() if name.startswith("student-")]
    enough = [report for report in swept if report.accuracy >= dev["teacher"].accuracy - slack]
    if enough:
        best = max(enough, key=lambda report: report.tokens_per_forward)
    else:
        best = max(swept, key=lambda report: report.accuracy)
    assert best.threshold is not None
    return best.threshold


def with_same_passes(found: Mapping[str, Report], student: Report) -> str | None:
    """Of the teachers cut to fewer passes, the quickest that still has as many passes as the student."""

    def passes(report: Report) -> float:
        return float(report.to_json()["num_forwards_mean"])

    enough = {
        name: report
        for name, report in found.items()
        if name.startswith("teacher-steps-") and passes(report) >= passes(student)
    }
    return min(enough, key=lambda name: passes(enough[name]), default=None)


def compared(found: Mapping[str, Report], threshold: float) -> list[dict[str, Any]]:
    """The pairs that the cards speak of, as far as both are there."""
    student = f"student-{threshold}"
    pairs = [(student, "teacher"), (student, "ar"), ("teacher", "ar"), (student, f"untrained-{threshold}")]
    pairs += [(student, name) for name in found if name.startswith("teacher-threshold-")]
    if student in found and (same := with_same_passes(found, found[student])):
        pairs.append((student, same))
    return [
        comparison_row(first, second, compare(found[first], found[second]))
        for first, second in pairs
        if first in found and second in found and _ids(found[first]) == _ids(found[second])
    ]


def _ids(report: Report) -> list[str]:
    return [record.id for record in report.records]


def comparison_row(first: str, second: str, comparison: Comparison) -> dict[str, Any]:
    told = comparison.to_json()
    del told["first"], told["second"], told["speed_factors"]
    return {"first": first, "second": second, **told}


def gather_accuracy(folder: Path, sets: Mapping[str, Sequence[Problem]], slack: float) -> dict[str, Any]:
    """Write and return `accuracy.json`: a report for each set and contender, of the shards there are, and comparisons.

    Two contenders are compared once both have answered the same problems.
    """
    shards: dict[tuple[str, str], list[Any]] = {}
    about: dict[str, Any] = {"command": None, "machine": None}
    for name, result in results(folder / "accuracy").items():
        set_name, contender, _ = name.split("--")
        shards.setdefault((set_name, contender), []).append(result)
        about = {key: result[key] for key in about}
    reports: dict[str, dict[str, Report]] = {name: {} for name in sets}
    for (set_name, contender), parts in shards.items():
        if set_name in sets:
            reports[set_name][contender] = merged(parts, {item.id: item for item in sets[set_name]})
    dev = reports.get("dev", {})
    ready = "teacher" in dev and any(name.startswith("student-") for name in dev)
    threshold = choose_threshold(dev, slack) if ready else 0.9
    told = {
        **about,
        "chosen_threshold": threshold,
        "chosen_on": f"{dev['teacher'].n} development problems, at most {100 * slack:g} points below the teacher"
        if ready
        else "not chosen",
        "rows": [
            {"set": set_name, "contender": contender, **report.to_json()}
            for set_name, found in reports.items()
            for contender, report in found.items()
        ],
        "comparisons": [
            {"set": set_name, **row} for set_name, found in reports.items() for row in compared(found, threshold)
        ],
        "without_stopping": [row for set_name, found in reports.items() for row in _without_stopping(set_name, found)],
    }
    write_json_whole(folder / "accuracy.json", told)
    return told


def _without_stopping(set_name: str, found: Mapping[str, Report]) -> list[dict[str, Any]]:
    """Whether the published teacher and the stopping one solve the same problems."""
    if "teacher" not in found or "teacher-published" not in found:
        return []
    stopping = {record.id: record for record in found["teacher"].records}
    published = [record for record in found["teacher-published"].records if record.id in stopping]
    agree = sum(
        (record.correct, record.num_tokens) == (stopping[record.id].correct, stopping[record.id].num_tokens)
        for record in published
    )
    return [{"set": set_name, "n": len(published), "same_outcome_and_length": agree}]


CURVES = {
    "student-": "student, cached, under a threshold",
    "untrained-": "teacher's weights, block-causal, untrained",
    "teacher-threshold-": "teacher, uncached, under a threshold",
    "teacher-steps-": "teacher, uncached, cut to fewer passes",
    "ar": "autoregressive, cached",
}


def accuracy_curves(rows: Sequence[Mapping[str, Any]], set_name: str) -> dict[str, list[Mapping[str, Any]]]:
    """For the plot: the rows of a set by curve; the teacher at one token per pass ends the curve of its passes."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = "teacher-steps-" if row["contender"] == "teacher" else row["contender"]
        title = next((title for prefix, title in CURVES.items() if name.startswith(prefix)), None)
        if row["set"] == set_name and title is not None:
            curves.setdefault(title, []).append(row)
    return curves


@app.command()
def accuracy(
    results_folder: Results = Path("results"),
    ar: str = "gsm-ar",
    teacher: str = "gsm-teacher",
    student: str = "gsm-student",
    test: Annotated[int, typer.Option(help="test problems")] = 10_000,
    heldout: Annotated[int, typer.Option(help="problems of the held-out templates")] = 2_000,
    dev: Annotated[int, typer.Option(help="development problems, which choose the threshold")] = 1_000,
    published: Annotated[int | None, typer.Option(help="limit of problems for the teacher without early stop")] = None,
    threshold: Annotated[list[float], typer.Option()] = [0.8, 0.9, 0.95, 0.99],  # noqa: B006
    teacher_steps: Annotated[list[int], typer.Option()] = [24, 32, 48, 64],  # noqa: B006
    slack: Annotated[
        float, typer.Option(help="how far below the teacher the chosen threshold may be, as a share")
    ] = 0.0,
    max_new_tokens: int = 256,
    shard: int = 2_500,
    batch_size: int = 1_250,
    problem_folder: Path = Path("runs/problems"),
    time_limit: Annotated[float | None, typer.Option(help="seconds after which no job is begun")] = None,
) -> None:
    """Every contender on development problems, test problems and held-out templates, then `accuracy.json`."""
    sets = {
        "dev": problem_set("dev", dev, problem_folder),
        "test": problem_set("test", test, problem_folder),
        "heldout": problem_set("heldout", heldout, problem_folder),
    }
    everyone = contenders(
        Models(ar, teacher, student), threshold, teacher_steps, max_new_tokens=max_new_tokens, published=published
    )

    def make_jobs() -> list[Job]:
        return accuracy_jobs(sets, everyone, shard=shard, batch_size=batch_size)

    if spread(make_jobs, results_folder / "accuracy", time_limit_s=time_limit):
        told = gather_accuracy(results_folder, sets, slack)
        for row in told["rows"]:
            print(
                f"{row['set']:8} {row['contender']:24} n {row['n']:6} {row['accuracy']:.4f} tokens/forward "
                f"{row['tokens_per_forward']:.3f}"
            )
        for row in told["comparisons"]:
            print(f"{row['set']:8} {comparison_sentence(row)}")
        print(f"threshold {told['chosen_threshold']}, chosen on {told['chosen_on']}")
        try:
            plot_accuracy(accuracy_curves(told["rows"], "test"), results_folder / "accuracy", title="Test problems")
        except FewstepError as error:  # without matplotlib; the same command draws it later from what is there
            print(error)


# --- timing -----------------------------------------------------------------------------------------------------------


def timing_contenders(
    models: Models, *, student_threshold: float, teacher_threshold: float, device: str, max_new_tokens: int
) -> dict[str, Callable[[str], Output]]:
    """What is timed against what, by name."""
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "teacher as published": (models.teacher, {"early_stop": False}),
        "teacher with early stop": (models.teacher, {}),
        "teacher under a threshold": (models.teacher, {"threshold": teacher_threshold}),
        "student": (models.student, {"threshold": student_threshold}),
        "ar with cache": (models.ar, {}),
    }

    def contender(name: str, chosen: Mapping[str, Any]) -> Callable[[str], Output]:
        lm = loaded(name, device=device)
        return lambda prompt: lm.generate(prompt, max_new_tokens=max_new_tokens, **chosen)

    return {name: contender(model, chosen) for name, (model, chosen) in settings.items()}


def timing_json(timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Medians, their ratios over the student's, and the factors."""
    student = timings["student"]
    return {
        "timings": {name: timing.to_json() for name, timing in timings.items()},
        "over_student": {
            name: timing.seconds_median / student.seconds_median
            for name, timing in timings.items()
            if name != "student"
        },
        "factors": vars(speed_factors(timings["teacher as published"], timings["teacher with early stop"], student)),
        "seconds": {name: timing.seconds for name, timing in timings.items()},
    }


@app.command()
def timing(
    results_folder: Results = Path("results"),
    ar: str = "gsm-ar",
    teacher: str = "gsm-teacher",
    student: str = "gsm-student",
    device: str = "cpu",
    num: Annotated[int, typer.Option(help="test problems")] = 10,
    threshold: Annotated[
        float | None, typer.Option(help="the student's; chosen by `accuracy` if it ran, else 0.9")
    ] = None,
    teacher_threshold: float = 0.9,
    threads: Annotated[int | None, typer.Option(help="of the CPU")] = None,
    max_new_tokens: int = 256,
) -> None:
    """Seconds of one problem at a time, all contenders interleaved in one run: `timing-DEVICE.json`."""
    if threads:
        torch.set_num_threads(threads)
    measured = results_folder / "accuracy.json"
    chosen = threshold or (read_json(measured)["chosen_threshold"] if measured.exists() else 0.9)
    everyone = timing_contenders(
        Models(ar, teacher, student), student_threshold=chosen, teacher_threshold=teacher_threshold, device=device,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    items = problems("test", num)
    timings = time_interleaved(
        everyone, [item.question for item in items], progress=lambda: print(".", end="", flush=True)
    )
    told = {
        "command": this_command(),
        "machine": {**describe_machine(), "device": device},
        "n": num,
        "student_threshold": chosen,
        "teacher_threshold": teacher_threshold,
        **timing_json(timings),
    }
    write_json_whole(results_folder / f"timing-{device}.json", told)
    print(json.dumps({"over_student": told["over_student"], "factors": told["factors"]}, indent=1))


# --- throughput -------------------------------------------------------------------------------------------------------

FORMULA = (
    "6 x non-embedding parameters per real token + 6 x vocabulary x width per scored position + 12 x layers x width x "
    "mean visible "
    "keys per real token"
)
LORA_FORMULA = "as above with 4 instead of 6 for frozen weights, whose gradient is not formed, and 6 for the adapter's"


def matmul_flops_per_second(size: int, device: torch.device, dtype: torch.dtype, repeats: int = 50) -> float:
    """The rate of size x size matrix products: 2 size^3 operations each, the median of five series."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(6):
        seconds = _seconds_of(lambda: [a @ b for _ in range(repeats)], device)
        rates.append(repeats * 2 * size**3 / seconds)
    return statistics.median(rates[1:])  # the first series warms up


def _seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s


@dataclass
class Work:
    """What the packed forwards of an objective are made of, counted over batches; with and without gradient apart."""

    real_tokens: int = 0
    scored: int = 0
    visible_keys: int = 0
    real_tokens_without_gradient: int = 0
    scored_without_gradient: int = 0
    visible_keys_without_gradient: int = 0

    def add(self, real_tokens: int, scored: int, visible_keys: int, *, gradient: bool) -> None:
        if gradient:
            self.real_tokens += real_tokens
            self.scored += scored
            self.visible_keys += visible_keys
        else:
            self.real_tokens_without_gradient += real_tokens
            self.scored_without_gradient += scored
            self.visible_keys_without_gradient += visible_keys


def count_work(
    objective: Objective, vocab_size: int, *, rows: int, row_length: int, device: torch.device, batches: int = 4
) -> Work:
    """Replay the first batches with a forward that only counts."""
    objective.to(device)
    stream = BatchStream(objective, rows=rows, row_length=row_length, device=device)
    work = Work()
    for number in range(batches):
        batch = stream.next_batch()

        def forward(
            tokens_RT: Tensor,
            positions_RT: Tensor,
            layout: Layout,
            rows_S: Tensor,
            *,
            gradient: bool = True,
            batch: Any = batch,
        ) -> Tensor:
            visible = 0
            for row in range(len(tokens_RT)):  # one at a time: a dense mask of all rows is large
                one = Layout(*(part[row : row + 1] for part in (layout.document_RT, layout.block_RT, layout.noisy_RT)))
                visible += int(one.dense()[0, 0][batch.packed.real_RT[row]].sum())
            work.add(int(batch.packed.real_RT.sum()), len(rows_S), visible, gradient=gradient)
            return torch.zeros(len(rows_S), vocab_size, device=device, requires_grad=gradient)

        objective.loss(forward, batch, torch.Generator(device=device).manual_seed(number))
    return work


def flops_per_token(network: Network, work: Work, *, adapter_parameters: int = 0) -> float:
    """Operations of a training step for each real token, by FORMULA.

    A forward without gradient counts a third: 2 instead of 6, 4 instead of 12. With an adapter, LORA_FORMULA: frozen
    weights and the frozen head take 4, since their own gradient is never formed; attention stays 12.
    """
    config = network.module.config
    embedding = network.module.get_input_embeddings().weight.numel()
    tied = network.module.get_output_embeddings().weight is network.module.get_input_embeddings().weight
    weights = sum(parameter.numel() for parameter in network.module.parameters()) - embedding * (1 if tied else 2)
    width, layers = config.hidden_size, config.num_hidden_layers
    per_weight = 4 if adapter_parameters else 6

    with_gradient = (
        (per_weight * weights + 6 * adapter_parameters) * work.real_tokens
        + per_weight * config.vocab_size * width * work.scored
        + 12 * layers * width * work.visible_keys
    )
    without_gradient = (
        2 * (weights + adapter_parameters) * work.real_tokens_without_gradient
        + 2 * config.vocab_size * width * work.scored_without_gradient
        + 4 * layers * width * work.visible_keys_without_gradient
    )
    return (with_gradient + without_gradient) / work.real_tokens


def measure_training(
    name: str,
    network: Network,
    objective: Objective,
    lora: LoRASettings | None,
    *,
    steps: int,
    rows: int,
    row_length: int,
    matmul_rate: float,
) -> dict[str, Any]:
    """Train for some steps by the trainer itself; tokens per second are the median of its windows, the first (which
    compiles) left out.
    """
    cuda = network.device.type == "cuda"
    every = max(1, steps // 6)
    settings = TrainSettings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=1e-5, warmup_steps=1, log_every=every,
        compiled=cuda, precision="bf16" if cuda else "no",
    )  # fmt: skip
    config_parameters = sum(parameter.numel() for parameter in network.module.parameters())
    work = count_work(objective, network.vocab_size, rows=rows, row_length=row_length, device=network.device)
    plain = Network(network.module, network.role, network.tokenizer, name=network.name)
    per_token_full = flops_per_token(plain, work)
    # Before the adapter's layers replace the plain ones: r x (in + out) for every linear layer but the head.
    head = network.module.get_output_embeddings()
    adapter = sum(
        lora.rank * (layer.in_features + layer.out_features)
        for layer in network.module.modules()
        if lora and isinstance(layer, torch.nn.Linear) and layer is not head
    )
    per_token = flops_per_token(plain, work, adapter_parameters=adapter) if lora else per_token_full
    with tempfile.TemporaryDirectory() as folder:
        done = train(network, objective, settings, Path(folder) / "model", lora=lora)
    rates = [line["tokens_per_second"] for line in done.history if "tokens_per_second" in line]
    tokens_per_second = statistics.median(rates[1:] or rates)
    return {
        "objective": name,
        "parameters": config_parameters,
        "adapter_parameters": adapter,
        "rows": rows,
        "row_length": row_length,
        "packing": work.real_tokens / (4 * rows * row_length),
        "mean_visible_keys": work.visible_keys / work.real_tokens,
        "scored_share": work.scored / work.real_tokens,
        "forward_without_gradient_share": work.real_tokens_without_gradient / work.real_tokens,
        "real_tokens_per_second": tokens_per_second,
        "flops_per_real_token": per_token,
        "formula": LORA_FORMULA if lora else FORMULA,
        "share_of_matmul_rate": per_token * tokens_per_second / matmul_rate,
    }


def throughput_cases(
    teacher: str, store: Path, *, device: str, rank: int
) -> list[tuple[str, Callable[[], tuple[Network, Objective, LoRASettings | None]]]]:
    """The objectives by name, each with a fresh network. References of the store are the data of the first two."""

    def network(role: RoleName) -> Network:
        found = load_network(teacher, dtype="float32", device=device)
        mask = None if role == "autoregressive" else found.role.mask_token_id
        spec = replace(
            found.role,
            name=role,
            mask_token_id=mask,
            right_shift_logits=found.role.right_shift_logits and mask is not None,
        )
        return Network(found.module, spec, found.tokenizer, name=teacher)

    @cache
    def stored() -> tuple[Any, Examples]:
        table, references = read_table(store, load_network(teacher, dtype="float32", device=device))
        if references is None:
            raise FewstepError(f"the trajectories in {store} hold no reference answers to train on")
        return table, references

    def causal() -> tuple[Network, Objective, LoRASettings | None]:
        one = network("autoregressive")
        return one, CausalObjective(one.role, stored()[1], one.eos_token_id), None

    def diffusion() -> tuple[Network, Objective, LoRASettings | None]:
        one = network("bidirectional")
        corruption = Corruption(leftward=0.5, frontier=0.3)
        return one, MaskedDiffusionObjective(one.role, stored()[1], one.eos_token_id, corruption=corruption), None

    def cdlm(lora: LoRASettings | None, **settings: Any) -> tuple[Network, Objective, LoRASettings | None]:
        one = network("block_causal")
        table, references = stored()
        objective = CDLMObjective(
            one.role, table, one.eos_token_id, references=references, settings=CDLMSettings(denoising=0.1, **settings)
        )
        return one, objective, lora

    return [
        ("causal", causal),
        ("teacher (masked diffusion)", diffusion),
        ("cdlm, full weights", lambda: cdlm(None)),
        ("cdlm, LoRA", lambda: cdlm(LoRASettings(rank=rank, alpha=rank))),
        ("cdlm, full weights, without consistency", lambda: cdlm(None, consistency=0.0)),
    ]


@app.command()
def throughput(
    results_folder: Results = Path("results"),
    teacher: str = "gsm-teacher",
    store: Path = Path("runs/gsm/trajectories"),
    device: str = "auto",
    steps: int = 120,
    rows: Annotated[
        int, typer.Option(help="packed rows of a step; the causal objective and the teacher's train on as many")
    ] = 48,
    row_length: int = 2048,
    rank: int = 32,
    matmul_size: int = 8192,
) -> None:
    """Training throughput on real tokens as a share of the device's matrix rate: `throughput.json`."""
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    rate = matmul_flops_per_second(matmul_size, place, dtype)
    told: dict[str, Any] = {
        "command": this_command(),
        "machine": {**describe_machine(), "device": str(place)},
        "matmul": f"{matmul_size}^3 {str(dtype).removeprefix('torch.')}",
        "matmul_flops_per_second": rate,
        "formula": FORMULA,
        "rows": [],
        "failed": [],
    }
    for name, make in throughput_cases(teacher, store, device=str(place), rank=rank):
        torch.compiler.reset()  # each has its graphs to itself, so that none runs into the limit of recompilations
        try:
            network, objective, lora = make()
            row = measure_training(
                name, network, objective, lora, steps=steps, rows=rows, row_length=row_length, matmul_rate=rate
            )
        except (FewstepError, RuntimeError) as error:  # out of memory among them: the others are worth having
            told["failed"].append({"objective": name, "error": str(error)[:500]})
            print(f"{name} failed: {error}", flush=True)
        else:
            told["rows"].append(row)
            print(
                f"{name}: {row['real_tokens_per_second'] / 1e6:.3f} M real tokens/s, {row['share_of_matmul_rate']:.1%} "
                "of "
                f"{rate / 1e12:.0f} TFLOP/s",
                flush=True,
            )
        write_json_whole(results_folder / "throughput.json", told)


# --- cards ------------------------------------------------------------------------------------------------------------


@app.command()
def cards(
    results_folder: Results = Path("results"),
    bundled: Annotated[Path, typer.Option(help="folder that holds the models")] = BUNDLED,
    ar_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
    teacher_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
    student_report: Annotated[Path | None, typer.Option(help="report.json of its training")] = None,
) -> None:
    """Write README.md of the three bundled models from the results and the training reports."""
    reports: dict[Kind, Path | None] = {"ar": ar_report, "teacher": teacher_report, "student": student_report}
    for kind, path in reports.items():
        name = f"gsm-{kind}"
        sources = Sources(results_folder, [])
        for picture in ("accuracy.png", "ablation.png") if kind == "student" else ():
            if (results_folder / picture).exists():
                shutil.copy(results_folder / picture, bundled / name / picture)
        text = card(name, kind, bundled / name, read_json(path) if path else None, sources)
        with write_whole(bundled / name / "README.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(
            f"{bundled / name / 'README.md'}"
            + (f"; left out, as not there: {', '.join(sources.missing)}" if sources.missing else "")
        )


if __name__ == "__main__":
    app()
