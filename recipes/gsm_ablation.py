"""Does the consistency training matter? Eight ways to train the student, beside the untrained one and the teacher.

`python recipes/gsm_ablation.py run` spreads the jobs over the visible GPUs and may be repeated until all are done;
`report` writes the table and the plot from `results/ablation.json`. It needs a teacher (the bundled one, or a folder)
and its trajectories (`recipes/gsm.py trajectories`).

What is equal: the initialisation (the teacher's weights and, for one seed, the same fresh LoRA), the optimizer, its
steps, and the packed tokens of each step, all documents counted as `[context | noisy response | clean response]`. A
variant that also trains on references packs them into the same rows: half of its documents are references, and it sees
half as many trajectories. Likewise about half of the trajectories of variant 8 are the student's own. The second
forward of the consistency loss, which has no gradient, adds work but no training tokens.

Axes: S = seeds, I = problems.
"""

import copy
import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from jobs import Job, results, spread

from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.files import read_json, write_json_whole, write_whole
from fewstep.measure.evaluate import Report, sweep
from fewstep.measure.gsm_symbolic import Problem, problems
from fewstep.measure.metrics import CONFIDENCE, Interval, student_quantile
from fewstep.measure.plots import plot_accuracy
from fewstep.measure.timing import describe_machine
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.roles import Role
from fewstep.train.cdlm import CDLMObjective, CDLMSettings, TopDistributions, TrajectoryTable, concatenate
from fewstep.train.collect import collect, decode_with, teacher_of
from fewstep.train.examples import Examples
from fewstep.train.lora import LoRASettings
from fewstep.train.objectives import MaskedDiffusionObjective, Objective
from fewstep.train.relabel import Labelling, labelled, of_student
from fewstep.train.trainer import TrainResult, TrainSettings, train
from fewstep.train.trajectories import PromptRow, TrajectoryStore
from fewstep.train.trajectory_table import read_table

app = typer.Typer(pretty_exceptions_enable=False)
Results = Annotated[Path, typer.Option("--results", help="folder for figures")]
Runs = Annotated[Path, typer.Option(help="folder for adapters and the student's own states")]

CONSISTENCY, DENOISING = 0.5, 0.1  # the weights beside distillation's 1, as in recipes/gsm.py
OWN_STATES = "own-states"
OWN_SEED = 1000  # of the preliminary student, apart from those of the table
ALL_THREE = "7"

# --- what is trained on -----------------------------------------------------------------------------------------------


class Material:
    """Teacher and trajectories of one process, loaded when first needed."""

    def __init__(self, teacher: str, store: Path, runs: Path) -> None:
        self.teacher, self.store, self.runs = teacher, store, runs

    @cached_property
    def base(self) -> Network:
        """The teacher in float32, never changed itself."""
        return load_network(self.teacher, dtype="float32")

    def student(self) -> Network:
        """The teacher's weights in the block-causal role, to be trained."""
        return Network(
            copy.deepcopy(self.base.module),
            replace(self.base.role, name="block_causal"),
            self.base.tokenizer,
            name=self.teacher,
        )

    @cached_property
    def table(self) -> TrajectoryTable:
        return read_table(self.store, self.base)[0]

    @cached_property
    def references(self) -> Examples:
        found = read_table(self.store, self.base)[1]
        if found is None:
            raise FewstepError(
                f"the trajectories in {self.store} hold no reference answers, which variants 1, 7 and 8 train on"
            )
        return found

    @cached_property
    def teacher_text(self) -> Examples:
        """The teacher's answers as plain examples, each cut after its end-of-text."""
        return cut_after(self.table.examples, self.base.eos_token_id, self.base.role.mask_token_id)

    @cached_property
    def with_own_states(self) -> TrajectoryTable:
        """The trajectories of the teacher, and those of the preliminary student with the teacher's labels."""
        return joined(self.table, read_table(self.runs / OWN_STATES, self.base)[0])


def cut_after(examples: Examples, eos_token_id: int, mask_token_id: int | None) -> Examples:
    """The examples whose completion has an end-of-text and no mask before it, cut there."""
    prompts, completions = [], []
    for i in range(len(examples)):
        ids = examples.completion_ids[examples.completion_offsets[i] : examples.completion_offsets[i + 1]].tolist()
        if eos_token_id in ids and mask_token_id not in (kept := ids[: ids.index(eos_token_id) + 1]):
            prompts.append(examples.prompt_ids[examples.prompt_offsets[i] : examples.prompt_offsets[i + 1]].tolist())
            completions.append(kept)
    if not prompts:
        raise FewstepError("no trajectory reaches its end-of-text, so there is no teacher text to train on")
    return Examples.from_ids(prompts, completions)


def joined(first: TrajectoryTable, second: TrajectoryTable) -> TrajectoryTable:
    """Both tables as one of the student's states, which refuses the direction `hard`."""
    if not isinstance(first.distributions, TopDistributions) or not isinstance(second.distributions, TopDistributions):
        raise FewstepError("joining trajectories needs distributions stored as top_k in both")
    pairs = [
        (getattr(first.distributions, name), getattr(second.distributions, name))
        for name in TopDistributions.__dataclass_fields__
    ]
    return TrajectoryTable(
        concatenate(first.examples, second.examples),
        torch.cat([first.rank_P, second.rank_P]),
        TopDistributions(*(torch.cat(pair) for pair in pairs)),
        of_student=True,
    )


# --- variants ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """`objective(material, role)` is what makes it different; everything else is shared."""

    title: str
    objective: Callable[[Material, Role], Objective]
    needs: tuple[str, ...] = ()


def cdlm(own_states: bool = False, **settings: Any) -> Callable[[Material, Role], Objective]:
    """The CDLM objective with these settings, on references too if their loss has a weight."""
    chosen = CDLMSettings(**settings)

    def build(material: Material, role: Role) -> Objective:
        return CDLMObjective(
            role,
            material.with_own_states if own_states else material.table,
            material.base.eos_token_id,
            references=material.references if chosen.denoising else None,
            settings=chosen,
        )

    return build


VARIANTS = {
    "1": Variant(
        "masked denoising on references (plain block diffusion)",
        lambda material, role: MaskedDiffusionObjective(role, material.references, material.base.eos_token_id),
    ),
    "2": Variant(
        "hard targets: teacher text at random masks",
        lambda material, role: MaskedDiffusionObjective(role, material.teacher_text, material.base.eos_token_id),
    ),
    "3": Variant("hard targets: trajectory states", cdlm(direction="hard", consistency=0.0, denoising=0.0)),
    "4": Variant("distillation", cdlm(consistency=0.0, denoising=0.0)),
    "5": Variant("distillation + consistency", cdlm(consistency=CONSISTENCY, denoising=0.0)),
    "6": Variant("consistency alone", cdlm(distillation=0.0, consistency=1.0, denoising=0.0, allow_unanchored=True)),
    ALL_THREE: Variant("all three", cdlm(consistency=CONSISTENCY, denoising=DENOISING)),
    "8": Variant(
        "all three, half on the student's own states",
        cdlm(own_states=True, consistency=CONSISTENCY, denoising=DENOISING),
        needs=(OWN_STATES,),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every variant gets."""

    steps: int = 350
    rows: int = 32
    row_length: int = 2048
    learning_rate: float = 1.5e-3
    rank: int = 32

    def train(self, material: Material, variant: Variant, seed: int, output: Path) -> TrainResult:
        """A student of the variant in `output`. An unfinished run there is begun again."""
        cuda = torch.cuda.is_available()
        network = material.student()
        settings = TrainSettings(
            max_steps=self.steps, rows=self.rows, row_length=self.row_length, learning_rate=self.learning_rate,
            warmup_steps=max(1, self.steps // 12), log_every=max(1, self.steps // 4), seed=seed, compiled=cuda,
            precision="bf16" if cuda else "no", weights_dtype="bfloat16" if cuda else "float32",
        )  # fmt: skip
        objective = variant.objective(material, network.role)
        return train(network, objective, settings, output, lora=LoRASettings(rank=self.rank, alpha=self.rank))


# --- jobs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that the jobs share."""

    material: Material
    budget: Budget
    items: Sequence[Problem]
    thresholds: Sequence[float]
    teacher_steps: Sequence[int]
    own_threshold: float
    max_new_tokens: int
    batch_size: int

    def jobs(self, seeds: Sequence[int]) -> list[Job]:
        """What others need first, then one seed after the other."""
        untrained = [
            Job(name="untrained", run=self.untrained),
            Job(
                name="teacher-threshold", run=partial(self.of_teacher, "teacher-threshold", thresholds=self.thresholds)
            ),
            Job(name="teacher-steps", run=partial(self.of_teacher, "teacher-steps", steps=self.teacher_steps)),
        ]
        trained = [
            Job(name=f"variant-{key}-seed-{seed}", run=partial(self.variant, key, seed), needs=variant.needs)
            for seed in seeds
            for key, variant in VARIANTS.items()
        ]
        return [
            Job(name=OWN_STATES, run=self.own_states),
            *trained[: len(VARIANTS)],
            *untrained,
            *trained[len(VARIANTS) :],
        ]

    def variant(self, key: str, seed: int) -> dict[str, Any]:
        """Train, load what was saved as anybody would, and sweep the threshold."""
        output = self.material.runs / f"variant-{key}-seed-{seed}"
        if (output / "config.json").exists():
            report = read_json(output / "report.json")
        else:
            done = self.budget.train(self.material, VARIANTS[key], seed, output)
            report = {"real_tokens": done.real_tokens, "seconds": done.seconds, "history": done.history}
        training = {
            "training_tokens": report["real_tokens"],
            "training_seconds": report["seconds"],
            "final_loss": report["history"][-1]["loss"],
        }
        found = self._sweep(load(output), thresholds=self.thresholds)
        return {
            "rows": [{"variant": key, "title": VARIANTS[key].title, "seed": seed, **training, **row} for row in found]
        }

    def untrained(self) -> dict[str, Any]:
        """The teacher's weights in the block-causal role."""
        found = self._sweep(load(self.material.teacher, role="block_causal"), thresholds=self.thresholds)
        return {
            "rows": [
                {"variant": "untrained", "title": "teacher's weights, block-causal, untrained", "seed": None, **row}
                for row in found
            ]
        }

    def of_teacher(self, name: str, **swept: Any) -> dict[str, Any]:
        title = (
            "teacher, uncached, under a threshold"
            if "thresholds" in swept
            else "teacher, uncached, cut to fewer passes"
        )
        found = self._sweep(load(self.material.teacher), **swept)
        return {"rows": [{"variant": name, "title": title, "seed": None, **row} for row in found]}

    def own_states(self) -> dict[str, Any]:
        """A preliminary student of variant 7 decodes the trajectories' prompts; the teacher labels what it visits."""
        output = self.material.runs / "preliminary"
        if not (output / "config.json").exists():
            self.budget.train(self.material, VARIANTS[ALL_THREE], OWN_SEED, output)
        student, teacher = load_network(output), load_network(self.material.teacher)
        store = TrajectoryStore(self.material.store)
        distribution = store.distribution
        decoder = LanguageModel(student).decoder(max_new_tokens=self.max_new_tokens, threshold=self.own_threshold)
        decoding = decode_with(
            student, decoder, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, distribution=distribution
        )
        rows = [
            PromptRow(
                one.id, one.prompt_ids.tolist(), None if one.reference_ids is None else one.reference_ids.tolist()
            )
            for one in store
        ]
        report = collect(
            labelled(decoding, teacher, Labelling(distribution=distribution, canvas_length=self._teacher_canvas())),
            rows,
            self.material.runs / OWN_STATES,
            teacher=teacher_of(teacher),
            settings={
                "threshold": self.own_threshold,
                "teacher_canvas_length": self._teacher_canvas(),
                **of_student(student),
            },
            distribution=distribution,
            shard_size=self.batch_size,
        )
        return {
            "num_records": report.num_records,
            "num_positions": report.num_positions,
            "num_forwards": report.num_forwards,
        }

    def _teacher_canvas(self) -> int:
        block = self.material.base.role.block_size
        return -(-self.max_new_tokens // block) * block

    def _sweep(self, lm: LanguageModel, **swept: Any) -> list[dict[str, Any]]:
        """The keys of `eval --json` for each setting, and which problems were solved, as a string of 0 and 1."""
        found: list[Report] = sweep(
            lm, self.items, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens, **swept
        )
        return [
            {**report.to_json(), "correct": "".join(str(int(record.correct)) for record in report.records)}
            for report in found
        ]


@app.command()
def run(
    results_folder: Results = Path("results"),
    runs: Runs = Path("runs/ablation"),
    teacher: str = "gsm-teacher",
    store: Path = Path("runs/gsm/trajectories"),
    threshold: Annotated[list[float], typer.Option()] = [0.6, 0.8, 0.9, 0.95, 0.99],  # noqa: B006
    teacher_steps: Annotated[list[int], typer.Option()] = [16, 24, 32, 48, 64, 128, 256],  # noqa: B006
    seeds: int = 3,
    dev: int = 1000,
    steps: int = 350,
    rows: int = 32,
    row_length: int = 2048,
    learning_rate: float = 1.5e-3,
    rank: int = 32,
    own_threshold: float = 0.9,
    max_new_tokens: int = 256,
    batch_size: int = 1000,
    time_limit: Annotated[float | None, typer.Option(help="seconds after which no job is begun")] = None,
) -> None:
    """Train and evaluate what is missing, then gather `ablation.json`."""

    def make_jobs() -> list[Job]:
        study = Study(
            material=Material(teacher, store, runs),
            budget=Budget(steps=steps, rows=rows, row_length=row_length, learning_rate=learning_rate, rank=rank),
            items=problems("dev", dev),
            thresholds=threshold,
            teacher_steps=teacher_steps,
            own_threshold=own_threshold,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        return study.jobs(range(seeds))

    if spread(make_jobs, results_folder / "ablation", time_limit_s=time_limit):
        about = {
            "command": f"python recipes/gsm_ablation.py {shlex.join(sys.argv[1:])}",
            "machine": describe_machine(),
            "steps": steps,
            "tokens_per_step": rows * row_length,
            "lora_rank": rank,
            "learning_rate": learning_rate,
            "own_threshold": own_threshold,
        }
        print(gather(results_folder, about), flush=True)


def gather(folder: Path, about: Mapping[str, Any]) -> str:
    """Write `ablation.json`, a list of rows, and `ablation-about.json` from all finished jobs; say what is there."""
    found = results(folder / "ablation")
    rows = [row for result in found.values() for row in result.get("rows", [])]
    write_json_whole(folder / "ablation.json", rows)
    seconds = sum(result["job_seconds"] for result in found.values())
    write_json_whole(
        folder / "ablation-about.json",
        {**about, "device_seconds": seconds, "own_states": found.get(OWN_STATES)},
    )
    return (
        f"{len(found)} jobs are done ({seconds:.0f} device seconds); {len(rows)} rows are in {folder / 'ablation.json'}"
    )


# --- statistics -------------------------------------------------------------------------------------------------------


def crossed_interval(values_SI: np.ndarray, clusters: Sequence[int]) -> Interval:
    """The mean over seeds and problems with a 95 % interval for other seeds and other problems.

    Two variances are added: of the problems' means over the seeds, clustered (as `clustered_paired_interval`), and of
    the seeds' means. Student's t with the degrees of freedom of Welch and Satterthwaite. A little too wide, as what a
    seed does to a problem counts in both. Values may be differences.
    """
    num_seeds, num_items = values_SI.shape
    mean = float(values_SI.mean())
    sums: dict[int, float] = defaultdict(float)
    for value, cluster in zip(values_SI.mean(0) - mean, clusters, strict=True):
        sums[cluster] += float(value)
    num_clusters = len(sums)
    if num_clusters < 2:
        return Interval(mean, -1.0, 1.0)
    of_items = num_clusters / (num_clusters - 1) * sum(value**2 for value in sums.values()) / num_items**2
    of_seeds = float(values_SI.mean(1).var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    if of_items + of_seeds == 0:
        return Interval(mean, mean, mean)
    inverse_degrees = of_items**2 / (num_clusters - 1) + (of_seeds**2 / (num_seeds - 1) if num_seeds > 1 else 0.0)
    degrees = max(1, int((of_items + of_seeds) ** 2 / inverse_degrees))
    half = student_quantile(degrees, CONFIDENCE) * math.sqrt(of_items + of_seeds)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Setting:
    """One variant at one threshold or number of steps: tokens per forward [S], and right or wrong [S, I]."""

    tokens_per_forward_S: np.ndarray
    tokens_per_forward_correct_S: np.ndarray
    correct_SI: np.ndarray


def settings_of(rows: Sequence[Mapping[str, Any]], variant: str) -> dict[float, Setting]:
    """The variant's settings by threshold (or steps), over the seeds in order."""
    grouped: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["seed"] or 0):
        grouped[row["threshold"] if row["steps"] is None else row["steps"]].append(row)
    return {
        value: Setting(
            np.array([row["tokens_per_forward"] for row in group]),
            np.array([row["tokens_per_forward_correct"] or math.nan for row in group]),
            np.array([[int(mark) for mark in row["correct"]] for row in group]),
        )
        for value, group in sorted(grouped.items())
    }


def at_speed(settings: Mapping[float, Setting], tokens_per_forward: float) -> np.ndarray | None:
    """Right or wrong [S, I] at so many tokens per forward, each seed interpolated linearly between two of its settings.

    None if a seed does not get there with the settings measured.
    """
    if not settings:
        return None
    every = list(settings.values())
    rows = []
    for seed in range(len(every[0].correct_SI)):
        points = sorted(
            (one.tokens_per_forward_S[seed], i) for i, one in enumerate(every) if seed < len(one.correct_SI)
        )
        for (low, i), (high, j) in pairwise(points):
            if low <= tokens_per_forward <= high:
                share = (tokens_per_forward - low) / (high - low) if high > low else 0.0
                rows.append((1 - share) * every[i].correct_SI[seed] + share * every[j].correct_SI[seed])
                break
        else:
            return None
    return np.stack(rows)


def difference(first_SI: np.ndarray, second_SI: np.ndarray, clusters: Sequence[int]) -> Interval:
    """First less second, paired by problem and seed; one without seeds meets each of the other's."""
    if len(first_SI) != len(second_SI) and min(len(first_SI), len(second_SI)) > 1:
        shared = min(len(first_SI), len(second_SI))
        first_SI, second_SI = first_SI[:shared], second_SI[:shared]
    return crossed_interval(first_SI - second_SI, clusters)


# --- report -----------------------------------------------------------------------------------------------------------

OTHERS = ("untrained", "teacher-threshold", "teacher-steps")


def points(interval: Interval, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * interval.estimate:{sign}.1f} ({100 * interval.low:{sign}.1f} to {100 * interval.high:{sign}.1f})"


def exceeds(interval: Interval) -> bool:
    return interval.low > 0 or interval.high < 0


def markdown(
    rows: Sequence[Mapping[str, Any]], clusters: Sequence[int], threshold: float, about: Mapping[str, Any]
) -> str:
    """The tables, and in words which differences from variant 7 exceed their intervals."""
    titles = {row["variant"]: row["title"] for row in rows}
    by_variant = {variant: settings_of(rows, variant) for variant in [*VARIANTS, *OTHERS]}
    reference = by_variant[ALL_THREE].get(threshold)
    speed = float(reference.tokens_per_forward_S.mean()) if reference else math.nan
    num_seeds = max((len(one.correct_SI) for settings in by_variant.values() for one in settings.values()), default=0)
    lines = [
        f"Development problems: {len(clusters)}; seeds: up to {num_seeds}; main threshold {threshold}. Intervals are "
        "95 %, over seeds and "
        "problems, clustered by template. Differences are paired by problem and seed; the last column compares at "
        f"{speed:.2f} tokens per forward, the speed of variant 7, interpolated between thresholds.",
        "",
        "| | trained by | training tokens | solved, % | tokens per forward | on right answers | less 7, same threshold "
        "| less 7, same speed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    said: list[str] = []
    for variant in [*VARIANTS, "untrained"]:
        one = by_variant[variant].get(threshold)
        if one is None:
            lines.append(
                f"| {variant} | {VARIANTS[variant].title if variant in VARIANTS else variant} | not there | | | | | |"
            )
            continue
        tokens = [row["training_tokens"] for row in rows if row["variant"] == variant and "training_tokens" in row]
        cells = [
            variant,
            titles[variant],
            f"{np.mean(tokens):,.0f}" if tokens else "0",
            points(crossed_interval(one.correct_SI, clusters)),
            f"{one.tokens_per_forward_S.mean():.2f}",
            _mean_of_known(one.tokens_per_forward_correct_S),
        ]
        if variant == ALL_THREE or reference is None:
            lines.append(f"| {' | '.join([*cells, '', ''])} |")
            continue
        same_threshold = difference(one.correct_SI, reference.correct_SI, clusters)
        at_same_speed = at_speed(by_variant[variant], speed)
        same_speed = None if at_same_speed is None else difference(at_same_speed, reference.correct_SI, clusters)
        cells += [points(same_threshold, signed=True), points(same_speed, signed=True) if same_speed else "not reached"]
        lines.append(f"| {' | '.join(cells)} |")
        said.append(_sentence(variant, titles[variant], same_threshold, same_speed))
    lines += ["", *(f"- {sentence}" for sentence in said), "", "The whole sweeps: solved, % / tokens per forward.", ""]
    lines += _sweeps(
        {variant: by_variant[variant] for variant in [*VARIANTS, "untrained", "teacher-threshold"]}, "threshold"
    )
    lines += ["", *_sweeps({"teacher-steps": by_variant["teacher-steps"]}, "steps")]
    lines += ["", *_said_of_budget(about)]
    lines += ["", f"Command: `{about['command']}`, on {about['machine']['gpu'] or about['machine']['cpu']}."]
    return "\n".join(lines) + "\n"


def _mean_of_known(values_S: np.ndarray) -> str:
    known = values_S[~np.isnan(values_S)]
    return f"{known.mean():.2f}" if len(known) else "none right"


def _said_of_budget(about: Mapping[str, Any]) -> list[str]:
    """What was equal, and what was not."""
    own = about["own_states"]
    lines = [
        f"Every variant has the same initialisation, optimizer and budget: {about['steps']} steps of "
        f"{about['tokens_per_step']:,} packed tokens, LoRA rank {about['lora_rank']}. Training tokens are real tokens "
        "of packed documents (context, noisy and clean response); with references (7 and 8), half of the documents are "
        "references. The forward without gradient of the consistency loss is not counted."
    ]
    if own:
        lines.append(
            f"The own states of 8: {own['num_records']:,} answers of a preliminary student of variant 7 (seed "
            f"{OWN_SEED}, threshold {about['own_threshold']}), labelled by the teacher, beside the teacher's own; "
            "training that student is not counted."
        )
    return lines


def _sentence(variant: str, title: str, same_threshold: Interval, same_speed: Interval | None) -> str:
    def verdict(interval: Interval) -> str:
        return f"{points(interval, signed=True)} points, {'exceeds' if exceeds(interval) else 'within'} its interval"

    speed = verdict(same_speed) if same_speed else "not reached"
    return (
        f"{variant} ({title}) less 7: at the same threshold {verdict(same_threshold)}; at the same tokens per forward "
        f"{speed}."
    )


def _sweeps(by_variant: Mapping[str, Mapping[float, Setting]], name: str) -> list[str]:
    values = sorted({value for settings in by_variant.values() for value in settings})
    lines = [f"| {name} | {' | '.join(str(value) for value in values)} |", "|---" * (len(values) + 1) + "|"]
    for variant, settings in by_variant.items():
        cells = [
            f"{100 * settings[value].correct_SI.mean():.1f} / {settings[value].tokens_per_forward_S.mean():.2f}"
            if value in settings
            else ""
            for value in values
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def curves(rows: Sequence[Mapping[str, Any]], clusters: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """For the plot: means over the seeds at each setting, by the variant's name."""
    series: dict[str, list[dict[str, Any]]] = {}
    for variant in [*VARIANTS, *OTHERS]:
        title = next((row["title"] for row in rows if row["variant"] == variant), None)
        if title is None:
            continue
        name = f"{variant} {title}" if variant in VARIANTS else title
        series[name] = []
        for one in settings_of(rows, variant).values():
            interval = crossed_interval(one.correct_SI, clusters)
            series[name].append(
                {
                    "tokens_per_forward": float(one.tokens_per_forward_S.mean()),
                    "accuracy": interval.estimate,
                    "accuracy_ci95": [max(0.0, interval.low), min(1.0, interval.high)],
                }
            )
    return series


@app.command()
def report(results_folder: Results = Path("results"), threshold: float = 0.9) -> None:
    """Write `ablation.md`, `ablation.png` and `ablation.svg` from `ablation.json`."""
    rows = read_json(results_folder / "ablation.json")
    if not rows:
        raise FewstepError(f"{results_folder / 'ablation.json'} holds no row; run the jobs first")
    clusters = [item.template if item.template is not None else -1 for item in problems("dev", rows[0]["n"])]
    text = markdown(rows, clusters, threshold, read_json(results_folder / "ablation-about.json"))
    with write_whole(results_folder / "ablation.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)
    for path in plot_accuracy(curves(rows, clusters), results_folder / "ablation", title="Development problems"):
        print(path)


if __name__ == "__main__":
    app()
