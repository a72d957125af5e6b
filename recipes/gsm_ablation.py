"""Does the consistency training matter? Ways to train the student, beside the untrained one and the teacher.

`python recipes/gsm_ablation.py run` spreads the jobs over the visible GPUs and may be repeated until all are done;
`report` then writes the table and the plot from `results/ablation.json`. It needs a teacher (the bundled one, or a
folder) and its trajectories (`recipes/gsm.py trajectories`).

The report says what is equal between the variants, and what is not (`_said_of_budget` in gsm_ablation_report.py). All
documents count as `[context | noisy response | clean response]`. The forwards without gradient, the second one of the
consistency loss and the first of variant 9, add work but no training tokens.
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pipeline import student_of
from stages import BLOCK, Stage, digits, gpu_settings

from fewstep.cli.settings_commands import app_of
from fewstep.decode.decoder import threshold_rule
from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.json_files import read_json, write_json_whole
from fewstep.kept import keep_result, kept_result
from fewstep.measure.evaluate import sweep
from fewstep.measure.jobs import Job, spread, weights_of
from fewstep.measure.reports import report_columns
from fewstep.measure.timing import write_figures
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.roles import Role, RoleName
from fewstep.shards import MANIFEST_NAME
from fewstep.tasks.gsm_symbolic import problems
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.collect import collect, decode_with, teacher_of
from fewstep.train.corruption import BlockCorruption
from fewstep.train.examples import Examples, cut_after_end
from fewstep.train.lora import LoRASettings
from fewstep.train.objectives import MaskedDiffusionObjective, Objective
from fewstep.train.relabel import labelled, labelling_for, of_student
from fewstep.train.trainer import train
from fewstep.train.trajectories import TrajectoryStore, read_table
from fewstep.train.trajectory_table import TrajectoryTable, join
from fewstep.values import Count

CONSISTENCY, DENOISING = 0.5, 0.1  # the weights beside distillation's 1, as in recipes/gsm.py
OWN_STATES = "own-states"
OWN_SEED = 1000  # of the preliminary student, apart from those of the table
ALL_THREE = "7"

# --- variants ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """`objective(study, role)` is what makes it different; everything else is shared."""

    title: str
    objective: Callable[["Ablation", Role], Objective]
    needs: tuple[str, ...] = ()


def cdlm(
    own_states: bool = False, visited: float = 0.0, late: float = 0.0, **settings: Any
) -> Callable[["Ablation", Role], Objective]:
    """The CDLM objective with these settings, on references too if their loss has a weight."""
    chosen = CDLMSettings(**settings)

    def build(study: "Ablation", role: Role) -> Objective:
        return CDLMObjective(
            role, study.with_own_states if own_states else study.stored[0], study.base.eos_token_id,
            references=study.references if chosen.denoising else None, settings=chosen,
            corruption=BlockCorruption(
                late=late, late_tokens=digits(study.base.tokenizer) if late else (), visited=visited
            ),
        )  # fmt: skip

    return build


VARIANTS = {
    "1": Variant(
        "masked denoising on references (plain block diffusion)",
        lambda study, role: MaskedDiffusionObjective(role, study.references, study.base.eos_token_id),
    ),
    "2": Variant(
        "hard targets: teacher text at random masks",
        lambda study, role: MaskedDiffusionObjective(role, study.teacher_text, study.base.eos_token_id),
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


# --- jobs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ablation(Stage):
    """Train and evaluate what is missing, then gather `ablation.json`."""

    results: Annotated[Path, "Folder for figures."] = Path("results")
    runs: Annotated[Path, "Folder for adapters and the student's own states."] = Path("runs/ablation")
    teacher: str = "gsm-teacher"
    store: Annotated[Path, "The teacher's trajectories."] = Path("runs/gsm/trajectories")
    threshold: tuple[float, ...] = (0.6, 0.8, 0.9, 0.95, 0.99)
    teacher_steps: tuple[int, ...] = (16, 24, 32, 48, 64, 128, 256)
    seeds: Count = 3
    dev: Annotated[Count, "Development problems."] = 1000
    steps: Count = 350
    rows: Count = 32
    row_length: Count = 2048
    learning_rate: float = 1.5e-3
    rank: Count = 32
    own_threshold: float = 0.9
    max_new_tokens: Count = 256
    batch_size: Count = 1000
    time_limit: Annotated[float | None, "Seconds after which no job is begun."] = None

    @cached_property
    def base(self) -> Network:
        """The teacher in float32, never changed itself."""
        return load_network(self.teacher, dtype="float32")

    @cached_property
    def stored(self) -> tuple[TrajectoryTable, Examples | None]:
        return read_table(self.store, self.base)

    @property
    def references(self) -> Examples:
        if self.stored[1] is None:
            raise FewstepError(
                f"the trajectories in {self.store} hold no reference answers, which variants 1, 7 and 8 train on"
            )
        return self.stored[1]

    @cached_property
    def teacher_text(self) -> Examples:
        """The teacher's answers as plain examples, each cut after its end-of-text."""
        return cut_after_end(self.stored[0].examples, self.base.eos_token_id, self.base.role.mask_token_id)

    @cached_property
    def with_own_states(self) -> TrajectoryTable:
        """The trajectories of the teacher, and those of the preliminary student with the teacher's labels."""
        return join(self.stored[0], read_table(self.runs / OWN_STATES, self.base)[0])

    @cached_property
    def trained_by(self) -> dict[str, Any]:
        """What every trained student depends on beside its variant and seed."""
        names = ("steps", "rows", "row_length", "learning_rate", "rank", "max_new_tokens", "own_threshold")
        return {
            "weights": weights_of({"teacher": self.teacher}),
            "trajectories": read_json(self.store / MANIFEST_NAME),
            **{name: getattr(self, name) for name in names},
        }

    def run(self) -> None:
        jobs = self.jobs()
        found = spread(jobs, self.results / "ablation", time_limit_s=self.time_limit)
        if found is None:
            return
        rows = [row for result in found.values() for row in result.get("rows", [])]
        write_json_whole(self.results / "ablation.json", rows)
        seconds = sum(result["job_seconds"] for result in found.values())
        about = {
            "steps": self.steps, "tokens_per_step": self.rows * self.row_length, "lora_rank": self.rank,
            "learning_rate": self.learning_rate, "own_threshold": self.own_threshold, "device_seconds": seconds,
            "own_states": found.get(OWN_STATES),
        }  # fmt: skip
        write_figures(self.results / "ablation-about.json", about)
        told = f"{len(found)} of {len(jobs)} jobs are done ({seconds:.0f} device seconds); {len(rows)} rows are in "
        print(f"{told}{self.results / 'ablation.json'}", flush=True)

    def jobs(self) -> list[Job]:
        """What others need first, then one seed after the other. FewstepError if --runs holds other students."""
        judged_by = {**self.trained_by, "dev": self.dev, "thresholds": self.threshold}
        for key in VARIANTS:
            for seed in range(self.seeds):
                self._kept(f"variant-{key}-seed-{seed}", key, seed)
        trained = [
            Job(
                name=f"variant-{key}-seed-{seed}", made_by={**judged_by, "variant": key, "seed": seed},
                run=partial(self.variant, key, seed), needs=variant.needs,
            )
            for seed in range(self.seeds)
            for key, variant in VARIANTS.items()
        ]  # fmt: skip
        under_threshold = partial(self.untrained, "teacher-threshold", "teacher, uncached, under a threshold")
        cut = partial(self.untrained, "teacher-steps", "teacher, uncached, cut to fewer passes")
        weights = partial(self.untrained, "untrained", "teacher's weights, block-causal, untrained", "block_causal")
        return [
            Job(name=OWN_STATES, made_by=self.trained_by, run=self.own_states),
            *trained[: len(VARIANTS)],
            Job(name="untrained", made_by=judged_by, run=partial(weights, thresholds=self.threshold)),
            Job(name="teacher-threshold", made_by=judged_by, run=partial(under_threshold, thresholds=self.threshold)),
            Job(
                name="teacher-steps", made_by={**judged_by, "teacher_steps": self.teacher_steps},
                run=partial(cut, steps=self.teacher_steps),
            ),
            *trained[len(VARIANTS) :],
        ]  # fmt: skip

    def _kept(self, name: str, key: str, seed: int) -> dict[str, Any] | None:
        """The figures of a training that is finished."""
        return kept_result(self.runs / f"{name}.json", {**self.trained_by, "variant": key, "seed": seed})

    def trained(self, name: str, key: str, seed: int) -> dict[str, Any]:
        """Figures of the training of a variant in the folder `name`, which is done or gone on with if need be."""
        if (figures := self._kept(name, key, seed)) is not None:
            return figures
        network = student_of(copy.deepcopy(self.base))
        settings = gpu_settings(
            max_steps=self.steps, rows=self.rows, row_length=self.row_length, learning_rate=self.learning_rate,
            warmup_steps=max(1, self.steps // 12), log_every=max(1, self.steps // 4), seed=seed,
        )  # fmt: skip
        objective = VARIANTS[key].objective(self, network.role)
        lora = LoRASettings(rank=self.rank, alpha=self.rank)
        done = train(network, objective, settings, self.runs / name, lora=lora)
        figures = {"training_tokens": done.real_tokens, "training_seconds": done.seconds}
        keep_result(self.runs / f"{name}.json", figures, {**self.trained_by, "variant": key, "seed": seed})
        return figures

    def variant(self, key: str, seed: int) -> dict[str, Any]:
        """Train, load what was saved as anybody would, and sweep the threshold."""
        name = f"variant-{key}-seed-{seed}"
        figures = self.trained(name, key, seed)
        about = {"variant": key, "title": VARIANTS[key].title, "seed": seed, **figures}
        return self._rows(load(self.runs / name), about, thresholds=self.threshold)

    def untrained(self, variant: str, title: str, role: RoleName | None = None, **swept: Any) -> dict[str, Any]:
        """The teacher's weights, in the role of a student or in their own."""
        about = {"variant": variant, "title": title, "seed": None}
        return self._rows(load(self.teacher, role=role), about, block_size=BLOCK, **swept)

    def own_states(self) -> dict[str, Any]:
        """A preliminary student of variant 7 decodes the trajectories' prompts; the teacher labels what it visits."""
        self.trained("preliminary", ALL_THREE, OWN_SEED)
        store = TrajectoryStore(self.store)
        student, teacher = load_network(self.runs / "preliminary"), load_network(self.teacher)
        decoder = LanguageModel(student).decoder(max_new_tokens=self.max_new_tokens, threshold=self.own_threshold)
        decoding = decode_with(
            student, decoder, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size,
            distribution=store.distribution,
        )  # fmt: skip
        labelling = labelling_for(teacher, student, store.distribution, self.max_new_tokens)
        described = {**threshold_rule(decoder), "teacher_canvas_length": labelling.canvas_length, **of_student(student)}
        report = collect(
            labelled(decoding, teacher, labelling), store.prompt_rows(), self.runs / OWN_STATES,
            teacher=teacher_of(teacher), settings=described, stop_token_ids=student.stop_token_ids,
            distribution=store.distribution, shard_size=self.batch_size,
        )  # fmt: skip
        return {name: asdict(report)[name] for name in ("num_records", "num_positions", "num_forwards")}

    def _rows(self, lm: LanguageModel, about: Mapping[str, Any], **swept: Any) -> dict[str, Any]:
        """The keys of `eval --json` for each setting, and which problems were solved, as a string of 0 and 1."""
        found = sweep(
            lm, problems("dev", self.dev), batch_size=self.batch_size, max_new_tokens=self.max_new_tokens, **swept
        )
        rows = [{**about, **report.to_json(), "correct": report_columns(report)["correct"]} for report in found]
        return {"rows": rows}


app = app_of({"run": Ablation()})


@app.command()
def report(
    results_folder: Annotated[Path, typer.Option("--results", help="folder for figures")] = Path("results"),
    threshold: Annotated[float, typer.Option(help="the main threshold of the table")] = 0.9,
) -> None:
    """Write `ablation.md`, `ablation.png` and `ablation.svg` from `ablation.json`."""
    from gsm_ablation_report import write_report  # which imports the variants from here

    write_report(results_folder, threshold)


if __name__ == "__main__":
    run_recipe(app)
