"""Does the consistency training matter? Ways to train the student, beside the untrained one and the teacher.

`python recipes/gsm_ablation.py run` spreads the jobs over the visible GPUs and may be repeated until all are done;
`report` then writes the table and the plot from `results/ablation.json`. It needs a teacher (the bundled one, or a
folder) and its trajectories (`recipes/gsm.py trajectories`).

What is equal: the initialisation (the teacher's weights and, for one seed, the same fresh LoRA), the optimizer, its
steps, and the packed tokens of each step, all documents counted as `[context | noisy response | clean response]`. A
variant that also trains on references packs them into the same rows: half of its documents are references, and it sees
half as many trajectories. Likewise about half of the trajectories of variant 8 are the student's own. The second
forward of the consistency loss and the first of variant 9, which have no gradient, add work but no training tokens.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jobs import WEIGHTS, Job, check_settings, results, spread, weights_of
from stages import BLOCK, digits

from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.json_files import read_json, write_json_whole
from fewstep.measure.evaluate import Report, sweep
from fewstep.measure.timing import describe_machine, this_command
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.roles import Role
from fewstep.shards import MANIFEST_NAME
from fewstep.tasks.gsm_symbolic import problems
from fewstep.tasks.problems import Problem
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.collect import collect, decode_with, teacher_of
from fewstep.train.corruption import BlockCorruption
from fewstep.train.examples import Examples
from fewstep.train.lora import LoRASettings
from fewstep.train.objectives import MaskedDiffusionObjective, Objective
from fewstep.train.records import PromptRow
from fewstep.train.relabel import labelled, labelling_for, of_student
from fewstep.train.trainer import TrainResult, TrainSettings, train
from fewstep.train.trajectories import TrajectoryStore, read_table
from fewstep.train.trajectory_table import TrajectoryTable, join

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
        role = replace(self.base.role.playing("block_causal"), block_size=BLOCK)
        return copy.deepcopy(self.base).with_role(role)

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
        return join(self.table, read_table(self.runs / OWN_STATES, self.base)[0])


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


# --- variants ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """`objective(material, role)` is what makes it different; everything else is shared."""

    title: str
    objective: Callable[[Material, Role], Objective]
    needs: tuple[str, ...] = ()


def cdlm(
    own_states: bool = False, visited: float = 0.0, late: float = 0.0, **settings: Any
) -> Callable[[Material, Role], Objective]:
    """The CDLM objective with these settings, on references too if their loss has a weight."""
    chosen = CDLMSettings(**settings)

    def build(material: Material, role: Role) -> Objective:
        return CDLMObjective(
            role,
            material.with_own_states if own_states else material.table,
            material.base.eos_token_id,
            references=material.references if chosen.denoising else None,
            settings=chosen,
            corruption=BlockCorruption(
                late=late, late_tokens=digits(material.base.tokenizer) if late else (), visited=visited
            ),
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
    "9": Variant(
        "distillation + denoising of states that the student goes on to, as gsm-student is trained",
        cdlm(consistency=0.0, denoising=2.0, late=0.4, visited=0.8),
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
        found = self._sweep(
            load(self.material.teacher, role="block_causal"), thresholds=self.thresholds, block_size=BLOCK
        )
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
        found = self._sweep(load(self.material.teacher), **swept, block_size=BLOCK)
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
        labelling = labelling_for(teacher, student, distribution, self.max_new_tokens)
        report = collect(
            labelled(decoding, teacher, labelling),
            rows,
            self.material.runs / OWN_STATES,
            teacher=teacher_of(teacher),
            settings={
                "threshold": self.own_threshold,
                "teacher_canvas_length": labelling.canvas_length,
                **of_student(student),
            },
            stop_token_ids=student.stop_token_ids,
            distribution=distribution,
            shard_size=self.batch_size,
        )
        return {
            "num_records": report.num_records,
            "num_positions": report.num_positions,
            "num_forwards": report.num_forwards,
        }

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

    training = {
        WEIGHTS: weights_of({"teacher": teacher}), "trajectories": read_json(store / MANIFEST_NAME), "steps": steps,
        "rows": rows, "row_length": row_length, "learning_rate": learning_rate, "rank": rank,
        "own_threshold": own_threshold, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    check_settings(runs, training, begun=any(runs.glob("*/report.json")))
    settings = {**training, "dev": dev, "thresholds": threshold, "teacher_steps": teacher_steps}
    if spread(make_jobs, results_folder / "ablation", settings=settings, time_limit_s=time_limit):
        about = {
            "command": this_command(),
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


@app.command()
def report(
    results_folder: Results = Path("results"),
    threshold: Annotated[float, typer.Option(help="the main threshold of the table")] = 0.9,
) -> None:
    """Write `ablation.md`, `ablation.png` and `ablation.svg` from `ablation.json`."""
    from gsm_ablation_report import write_report  # which imports the variants from here

    write_report(results_folder, threshold)


if __name__ == "__main__":
    app()
