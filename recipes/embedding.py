"""Word problems in embedding space: from the masked-diffusion teacher to whole answers in one to a few passes.

    python recipes/embedding.py STAGE                             on a CPU or one GPU
    torchrun --nproc-per-node 2 recipes/embedding.py STAGE        on two

Stages, in order: `data` (rendered problems as token tables), `denoiser` (from the bundled teacher), `shortcuts` (the
denoiser learns long steps), `measure` (both, and the teacher cut to the same passes). Beside them, each from the
teacher or the denoiser, for comparison: `consistency`, `distillation`, `paths` (of the denoiser's sampler) and
`trajectories` (which learns from them), and `squared-error` (Diffusion-LM from scratch). Each writes a folder under
--runs; what is there is left alone, and training that was interrupted resumes.
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pipeline import Tables
from stages import FineTuning, Stage, device, worker
from word_problems import MAX_ANSWER, load_examples, prompt_rows

from fewstep.cli.settings_commands import app_of
from fewstep.decode.health import measure_diversity
from fewstep.engine.language_model import LanguageModel, load
from fewstep.json_files import read_json, write_json_whole
from fewstep.measure.contenders import table_by_passes
from fewstep.measure.evaluate import evaluate
from fewstep.models.embedding_denoiser import to_embedding_space
from fewstep.models.load import load_network
from fewstep.models.names import BUNDLED
from fewstep.models.network import Network
from fewstep.tasks.gsm_symbolic import problems
from fewstep.train.documents import CanvasLengths
from fewstep.train.embedding import (
    EmbeddingObjective,
    EmbeddingSettings,
    TokenCorruption,
    begin_embedding,
    warp_by_loss,
)
from fewstep.train.embedding_paths import collect_paths, read_paths
from fewstep.train.trainer import TrainSettings
from fewstep.values import Count

RUNS = Path("runs/embedding")
CANVAS = CanvasLengths(block_size=32)


@dataclass(frozen=True, kw_only=True)
class EmbeddingTraining(FineTuning):
    """Train a network in embedding space, begun from a causal or a diffusion model or from one in embedding space."""

    training: EmbeddingSettings
    corruption: TokenCorruption = field(default_factory=TokenCorruption)
    warp_examples: Annotated[int, "Examples by whose loss at the start time is warped; 0 keeps the warp."] = 0
    scratch: Annotated[bool, "Begin with fresh weights of the source's shape."] = False
    store: Annotated[str | None, "Folder under --runs of collected paths, which are learnt from."] = None
    average: Annotated[float, "Decay of the moving average of the weights, which is kept; 0 is none."] = 0.995
    answer_steps: Annotated[Count, "Passes in which the development problems are answered."] = 16

    def settings(self, **others: Any) -> TrainSettings:
        return super().settings(ema_decay=self.average or None, **others)

    def fit(self) -> None:
        source = self.load()
        if self.scratch:
            source.module.init_weights()
        paths = None if self.store is None else read_paths(self.runs / self.store)
        examples = load_examples(self.runs / "data") if paths is None else paths.examples
        network = self._in_embedding_space(source)
        if self.warp_examples:
            told = lambda level, loss: print(f"noise {level:.2f}: cross-entropy {loss:.3f}", flush=True)  # noqa: E731
            warp = warp_by_loss(network, examples, count=self.warp_examples, progress=told)
            network = to_embedding_space(network, warp=warp)
        network = begin_embedding(network, self.training)
        objective = EmbeddingObjective(
            network, examples, num_batches=self.steps, settings=self.training, corruption=self.corruption,
            canvas=CANVAS, paths=paths,
        )  # fmt: skip
        self.train(network, objective, steps=self.answer_steps)

    def _in_embedding_space(self, source: Network) -> Network:
        if source.role.embedding_space is not None:
            return source
        if self.training.objective == "mse":
            return to_embedding_space(source, predicts="embeddings", rows_from="noise")
        return to_embedding_space(source)


@dataclass(frozen=True, kw_only=True)
class CollectPaths(Stage):
    """Sample training problems with the denoiser, and keep points of the paths."""

    source: Annotated[str, "The denoiser: a folder under --runs, or another."]
    name: Annotated[str, "Folder under --runs for the paths."]
    prompts: Count
    steps: Count = 64
    points: Annotated[Count, "Points of a path that are kept."] = 4
    canvas_length: Count = MAX_ANSWER
    batch_size: Count = 256
    seed: int = 7

    def run(self) -> None:
        network = load_network(self.found(self.source), device=device())
        rows, _ = prompt_rows(network.tokenizer, self.prompts, self.seed)
        shards = collect_paths(
            network, [list(row.prompt_ids) for row in rows], self.runs / self.name, steps=self.steps,
            points=self.points, canvas_length=self.canvas_length, batch_size=self.batch_size, seed=self.seed,
            worker=worker(),
        )  # fmt: skip
        print(f"{self.runs / self.name}: {len(shards.finished())} shards", flush=True)


@dataclass(frozen=True, kw_only=True)
class Measuring(Stage):
    """Answer test problems at every number of passes, and some of them with several seeds."""

    models: Annotated[tuple[str, ...], "Folders under --runs, or bundled names, to measure."]
    passes: tuple[Count, ...] = (64, 32, 16, 8, 4, 2, 1)
    problems: Annotated[Count, "Test problems."]
    seeds: Annotated[Count, "Seeds with which the first problems are answered."] = 16
    seeded: Annotated[Count, "Problems that are answered with several seeds."] = 100
    batch_size: Count = 256
    samplers: Annotated[tuple[str, ...], "Samplers to try beside the default."] = ()

    def run(self) -> None:
        folder = self.runs / "results"
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.models:
            if name not in BUNDLED_TEACHERS and not (self.runs / name / "config.json").exists():
                print(f"{name} is not trained yet", flush=True)
                continue
            self._measure(name, folder)
        rows = [read_json(path) for path in sorted(folder.glob("*.json"))]
        table = table_by_passes(rows, self.passes)
        (folder / "table.md").write_text(table, encoding="utf-8")
        print(table, flush=True)

    def _measure(self, name: str, folder: Path) -> None:
        lm = load(self.found(name), device=device())
        for sampler in (None, *self.samplers) if lm.role.name == "embedding" else (None,):
            for steps in self.passes:
                path = folder / f"{name}-{sampler or 'default'}-{steps:03d}-{self.problems}.json"
                if not path.exists():
                    write_json_whole(path, self._row(lm, name, steps, {} if sampler is None else {"sampler": sampler}))

    def _row(self, lm: LanguageModel, name: str, steps: int, more: Mapping[str, Any]) -> dict[str, Any]:
        asked: dict[str, Any] = {"max_new_tokens": MAX_ANSWER, "steps": steps, "engine": "off", **more}
        if lm.role.name != "embedding":
            # In one block, since each block takes a pass at least.
            asked["block_size"] = MAX_ANSWER if steps < MAX_ANSWER // lm.role.block_size else lm.role.block_size
        test = problems("test", self.problems)
        report = evaluate(lm, test, batch_size=self.batch_size, warm_up=False, **asked)
        row = {**report.to_json(), "model": name, "steps": steps, "seed": 0, **more}
        if lm.role.name == "embedding" and self.seeds > 1:
            asked["batch_size"] = self.batch_size
            questions = [problem.question for problem in test[: self.seeded]]
            groups = [lm.generate(questions, seed=seed, **asked) for seed in range(self.seeds)]
            answers = [[output.token_ids for output in group] for group in zip(*groups, strict=True)]
            row |= measure_diversity(answers, ignored_ids=lm.network.stop_token_ids).to_json()
        print(json.dumps({key: row[key] for key in ("model", "steps", "accuracy", "accuracy_ci95")}), flush=True)
        return row


BUNDLED_TEACHERS = ("gsm-teacher",)


LONG: dict[str, Any] = {"runs": RUNS, "rows": 48, "warmup_steps": 50, "log_every": 100, "dev": 200}
"""What all trainings share: about 98,000 tokens a step."""

DENOISER = EmbeddingTraining(
    **LONG, source="gsm-teacher", name="denoiser", steps=2500, learning_rate=1.5e-3,
    training=EmbeddingSettings(canvases=3),
)  # fmt: skip

app = app_of({
    "data": Tables(runs=RUNS, tokenizer=BUNDLED / "gsm-tokenizer", examples=500_000, workers=16),
    "denoiser": DENOISER,
    "shortcuts": replace(
        DENOISER, source="denoiser", name="shortcuts", steps=1200, learning_rate=8e-4, warp_examples=64, answer_steps=4,
        training=EmbeddingSettings(objective="shortcut", canvases=3),
    ),
    "consistency": replace(
        DENOISER, source="denoiser", name="consistency", steps=1600, learning_rate=8e-4, warp_examples=64,
        answer_steps=4, training=EmbeddingSettings(objective="consistency", canvases=3),
    ),
    "distillation": replace(
        DENOISER, source="denoiser", name="distillation", steps=1200, learning_rate=8e-4, warp_examples=64,
        answer_steps=4, training=EmbeddingSettings(objective="distillation", target="average", canvases=3),
    ),
    "paths": CollectPaths(runs=RUNS, source="denoiser", name="paths", prompts=4096),
    "trajectories": replace(
        DENOISER, source="denoiser", name="trajectories", store="paths", steps=1600, learning_rate=8e-4,
        answer_steps=4, training=EmbeddingSettings(objective="trajectories", canvases=3),
    ),
    "squared-error": replace(
        DENOISER, name="squared-error", scratch=True, learning_rate=2e-3, answer_steps=200,
        training=EmbeddingSettings(objective="mse", canvases=3),
    ),
    "measure": Measuring(
        runs=RUNS, models=("denoiser", "shortcuts", "gsm-teacher"), problems=1000,
    ),
})  # fmt: skip

if __name__ == "__main__":
    run_recipe(app)
