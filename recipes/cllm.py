"""A causal model that answers in fewer passes: consistency training on its own Jacobi trajectories (CLLM).

    python recipes/cllm.py STAGE                                   on a CPU or one GPU
    torchrun --nproc-per-node 2 recipes/cllm.py STAGE              on two

Stages, in order: `trajectories` (the model's Jacobi decoding, every state kept), `student` (CLLM, an adapter), `shares`
(how much of it to keep), `medusa` (heads on the frozen model) and `draft` (a small model), which
`recipes/compare_decoders.py` sets beside it. `medusa` and `draft` train on the token tables of `recipes/gsm.py data`.
Each writes a folder under --runs; `trajectories` skips what is there, training resumes. The bundled `gsm-cllm` is
`gsm.py bundle runs/cllm/gsm-cllm-0.85 gsm-cllm --base gsm-ar` after the defaults of these.

Any causal model can be the source, such as SmolLM2: `--runs runs/smollm --source ar`, with `--data data` for heads and
draft. Its 49,152 tokens leave room for fewer --rows on 80 GB: 24, and 16 for heads.
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from pipeline import CausalFromScratch, Collecting
from stages import FineTuning, Rank, Runs, accuracy, device, worker
from word_problems import MAX_ANSWER, load_examples

from fewstep.cli.settings_commands import app_of
from fewstep.decode.jacobi import Jacobi
from fewstep.engine.language_model import load
from fewstep.files import write_text_whole
from fewstep.measure.compare import compare
from fewstep.measure.evaluate import Report, evaluate
from fewstep.measure.timing import this_command
from fewstep.models.adapters import write_share
from fewstep.models.load import load_network
from fewstep.models.medusa import MedusaHeads
from fewstep.tasks.gsm_symbolic import problems
from fewstep.train.causal_records import collect_jacobi, read_jacobi_table
from fewstep.train.cllm import CLLMObjective, CLLMSettings
from fewstep.train.medusa import MedusaObjective, MedusaSettings
from fewstep.train.trainer import train
from fewstep.values import Count, Share

RUNS, DATA = Path("runs/cllm"), Path("runs/gsm/data")


@dataclass(frozen=True, kw_only=True)
class JacobiTrajectories(Collecting):
    """Decode training problems in Jacobi windows, and keep every state."""

    window: Count = 16
    shard_size: Annotated[Count, "Prompts in a file; more than a batch, so that slots refill."] = 4096
    most_repetition: Annotated[Share | None, "Reject answers more repetitive than this share."] = None

    def run(self) -> None:
        network = load_network(self.found(self.source), device=device())
        rows, keep = self.rows(network)
        report = collect_jacobi(
            network, rows, self.runs / self.name, Jacobi(role=network.role, window=self.window),
            settings={"decoder": Jacobi.name, "max_new_tokens": MAX_ANSWER, "keep": self.kept},
            max_new_tokens=MAX_ANSWER, batch_size=self.batch_size, shard_size=self.shard_size, seed=self.seed,
            most_repetition=self.most_repetition, keep=keep, worker=worker(),
        )  # fmt: skip
        print(report, flush=True)


@dataclass(frozen=True, kw_only=True)
class CLLMStudent(FineTuning):
    """Train the model to jump from every state of a window to its fixed point."""

    store: Annotated[str, "Folder of trajectories under --runs."] = "jacobi"
    rank: Rank
    losses: CLLMSettings

    def fit(self) -> None:
        network = self.load()
        table, references = read_jacobi_table(self.runs / self.store, network)
        network = network.with_role(replace(network.role, jacobi_window=table.window))
        objective = CLLMObjective(
            network.role, table, network.eos_token_id, references=references, settings=self.losses
        )
        self.train(network, objective, rank=self.rank)


@dataclass(frozen=True, kw_only=True)
class Heads(FineTuning):
    """Train Medusa heads on the frozen model, then let it answer development problems with them."""

    finished: ClassVar[str] = "medusa.json"
    data: Annotated[Path, "Token tables, under --runs or anywhere."]
    medusa: MedusaSettings

    def fit(self) -> None:
        network = self.load()
        objective = MedusaObjective(
            network.role, load_examples(Path(self.found(self.data))), network.eos_token_id, settings=self.medusa
        )
        heads = MedusaHeads.of(network, self.medusa.heads)
        train(network, objective, self.settings(), self.output, heads=heads)
        if worker()[0] == 0:
            answer = accuracy(self.dev, decoder="medusa", heads=str(self.output))
            print(answer(load_network(self.found(self.source), device=device()), self.steps), flush=True)


app = app_of({
    "trajectories": JacobiTrajectories(runs=RUNS, source="gsm-ar", name="jacobi", prompts=32_768, seed=9),
    "student": CLLMStudent(
        runs=RUNS, source="gsm-ar", name="gsm-cllm", steps=2180, rows=48, learning_rate=1e-3, rank=24,
        losses=CLLMSettings(), dev=500,
    ),
    "medusa": Heads(
        runs=RUNS, source="gsm-ar", name="medusa", data=DATA, steps=1500, rows=48, learning_rate=1e-3,
        medusa=MedusaSettings(), dev=200,
    ),
    "draft": CausalFromScratch(
        runs=RUNS, source="gsm-ar", name="draft", layers=2, data=DATA, steps=2000, rows=48, learning_rate=2e-3,
        warmup_steps=200, log_every=100, dev=200,
    ),
})  # fmt: skip


@app.command()
def shares(
    runs: Runs = RUNS,
    results: Annotated[Path, typer.Option(help="folder for shares.md")] = Path("results/decoders"),
    source: Annotated[str, typer.Option(help="the causal model, under --runs or anywhere")] = "gsm-ar",
    name: str = "gsm-cllm",
    share: Annotated[list[float], typer.Option(min=0)] = [0.7, 0.8, 0.85, 0.9, 1.0],  # noqa: B006
    dev: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1)] = 100,
) -> None:
    """Write parts of the adapter as NAME-SHARE, and what development problems say of each.

    Between the base and the fully trained weights (weight-space interpolation, arXiv 2109.01903) accuracy is traded for
    tokens per pass.
    """
    if worker()[0] != 0:
        return
    items = problems("dev", dev)

    def answers(folder: str | Path) -> Report:
        return evaluate(load(folder, device=device()), items, batch_size=batch_size)

    baseline = answers(runs / source if (runs / source).exists() else source)
    lines = []
    for part in share:
        folder = runs / f"{name}-{part}"
        write_share(runs / name, folder, part)
        report = answers(folder)
        lines.append(f"- {report.tokens_per_forward:.2f} tokens a pass: {compare(report, baseline).sentence()}")
        print(lines[-1], flush=True)
    write_text_whole(results / "shares.md", "\n".join([f"`{this_command()}`", "", *lines, ""]))


if __name__ == "__main__":
    run_recipe(app)
