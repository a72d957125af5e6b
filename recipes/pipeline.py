"""From word problems to a few-step student: the stages, declared once. Recipes differ in the values of their stages.

The bundled models (gsm.py) and SmolLM2 (smollm.py) go the same way: token tables, a causal model, a masked-diffusion
teacher, its trajectories, a block-causal student.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from stages import BLOCK, AtLeast0, FineTuning, Rank, Stage, bundled_shape, device, digits, worker
from word_problems import MAX_ANSWER, keep_solved, load_examples, make_tables, prompt_rows

from fewstep.decode.decoder import threshold_rule
from fewstep.decode.requests import Output
from fewstep.engine.language_model import LanguageModel
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.roles import ContextAttention, Role
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.collect import collect_top
from fewstep.train.corruption import BlockCorruption, Corruption
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective
from fewstep.train.records import PromptRow
from fewstep.train.trajectories import read_table
from fewstep.train.trajectory_table import join
from fewstep.values import Count, Share

Threshold = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class Tables(Stage):
    """Render and tokenize training problems of GSM-Symbolic, arithmetic drills, and GSM8K's training problems."""

    tokenizer: Annotated[Path, "Folder of the tokenizer, under --runs or anywhere."]
    gsm8k: Annotated[Path | None, "Folder with GSM8K's train.jsonl and test.jsonl."] = None
    examples: Annotated[Count, "Rows of GSM-Symbolic, drills included."]
    workers: Count
    seed: int = 1

    def run(self) -> None:
        make_tables(
            self.runs / "data", Path(self.found(self.tokenizer)), self.examples, seed=self.seed, workers=self.workers,
            gsm8k=self.gsm8k,
        )  # fmt: skip


# --- causal model and teacher ---


@dataclass(frozen=True, kw_only=True)
class Causal(FineTuning):
    """Fine-tune a causal model on the token tables."""

    data: Annotated[Path, "Token tables, under --runs or anywhere."] = Path("data")
    rank: Rank = 0

    def network(self) -> Network:
        return self.load()

    def fit(self) -> None:
        network = self.network()
        examples = load_examples(Path(self.found(self.data)))
        self.train(network, CausalObjective(network.role, examples, network.eos_token_id), rank=self.rank)


@dataclass(frozen=True, kw_only=True)
class CausalFromScratch(Causal):
    """Train a causal model of the bundled width from scratch on the token tables."""

    source: Annotated[str | None, "Whose vocabulary and positions it has; by default the bundled ones."] = None  # type: ignore[assignment]
    layers: Annotated[int, Ge(1)] = 12

    def network(self) -> Network:
        like = None if self.source is None else load_network(self.found(self.source), device="cpu")
        return bundled_shape(self.name, device(), layers=self.layers, like=like)


@dataclass(frozen=True, kw_only=True)
class Teacher(FineTuning):
    """Adapt a causal model (or continue a teacher) to masked diffusion."""

    context_attention: ContextAttention = "causal"
    shift: Annotated[bool, "A row scores the next token, as in the causal model."] = True
    leftward: Annotated[Share, "Share of rows shown as in block-by-block decoding."] = 0.8
    frontier: Annotated[Share, "Share of these that are open up to a point."] = 0.25
    late: Annotated[Share, "Share of these that hide their digits longest."] = 0.45
    visited: Annotated[Share, "Share of these that the network first goes on with by itself."] = 0.0
    canvases: Annotated[Count, "States of an answer that share its prompt."] = 3
    threshold: Annotated[Threshold | None, "Of the decoding that answers --dev problems; by default none."] = None
    gaps: Annotated[AtLeast0 | None, "With that threshold."] = None

    def fit(self) -> None:
        network = self.load()
        given = network.role.mask_token_id
        role = Role(
            name="bidirectional", block_size=BLOCK, context_attention=self.context_attention,
            mask_token_id=network.tokenizer.mask_token_id if given is None else given, right_shift_logits=self.shift,
        )  # fmt: skip
        network = Network(network.module, role, network.tokenizer, name=self.name)
        corruption = Corruption(
            leftward=self.leftward, frontier=self.frontier, late=self.late, visited=self.visited,
            late_tokens=digits(network.tokenizer) if self.late else (),
        )  # fmt: skip
        objective = MaskedDiffusionObjective(
            role, load_examples(self.runs / "data"), network.eos_token_id, corruption=corruption, canvases=self.canvases
        )
        self.train(network, objective, threshold=self.threshold, gaps=self.gaps)


# --- trajectories and student ---


@dataclass(frozen=True, kw_only=True)
class Collecting(Stage):
    """A stage that decodes training problems; finished shards are kept."""

    source: Annotated[str, "The model that decodes: a folder under --runs, a bundled name, or another folder."]
    name: Annotated[str, "Folder under --runs for the result."]
    prompts: Annotated[AtLeast0, "Of GSM-Symbolic."]
    gsm8k: Annotated[Path | None, "Folder with GSM8K's train.jsonl and test.jsonl."] = None
    gsm8k_prompts: Annotated[AtLeast0, "Of GSM8K's training problems, if they are given."] = 0
    batch_size: Count = 1024
    solved: Annotated[bool, "Keep only what the model solves."] = True
    seed: int

    @property
    def kept(self) -> str:
        return "solved" if self.solved else "all"

    def rows(self, network: Network) -> tuple[list[PromptRow], Callable[[PromptRow, Output], bool]]:
        """The prompts, and which outputs are kept."""
        rows, answers = prompt_rows(
            network.tokenizer, self.prompts, self.seed, gsm8k=self.gsm8k, gsm8k_count=self.gsm8k_prompts
        )
        return rows, keep_solved(network.tokenizer, answers, solved=self.solved)


@dataclass(frozen=True, kw_only=True)
class Trajectories(Collecting):
    """Decode training problems with the teacher."""

    threshold: Annotated[Threshold | None, "By default one token a pass."] = None
    gaps: Annotated[AtLeast0 | None, "With a threshold."] = None

    def run(self) -> None:
        network = load_network(self.found(self.source), device=device())
        rows, keep = self.rows(network)
        decoder = LanguageModel(network).decoder(
            max_new_tokens=MAX_ANSWER, block_size=BLOCK, threshold=self.threshold, gaps=self.gaps
        )
        report = collect_top(
            network, decoder, rows, self.runs / self.name, max_new_tokens=MAX_ANSWER, batch_size=self.batch_size,
            settings={"max_new_tokens": MAX_ANSWER, **threshold_rule(decoder), "early_stop": True, "keep": self.kept},
            shard_size=self.batch_size, seed=self.seed, keep=keep, worker=worker(),
        )  # fmt: skip
        print(report, flush=True)


def student_of(teacher: Network) -> Network:
    """The teacher's weights in the block-causal role."""
    return teacher.with_role(replace(teacher.role.playing("block_causal"), block_size=BLOCK))


@dataclass(frozen=True, kw_only=True)
class Student(FineTuning):
    """Post-train the teacher into a block-causal student with the three CDLM losses."""

    store: Annotated[str, "Folder of trajectories under --runs."] = "trajectories"
    own: Annotated[str | None, "Folder under --runs of a student's own states, to train on as well."] = None
    examples: Annotated[AtLeast0, "References: so many rows of the tables, or 0 for those of the store."] = 0
    rank: Rank
    losses: CDLMSettings
    late: Annotated[Share, "Share of the references' blocks that hide their digits longest."] = 0.0
    visited: Annotated[Share, "Share of them that the network first goes on with by itself."] = 0.0

    def fit(self) -> None:
        base = self.load()
        table, references = read_table(self.runs / self.store, teacher=base)
        if self.own:
            table = join(table, read_table(self.runs / self.own, teacher=base)[0])
        if self.examples:
            references = load_examples(self.runs / "data", self.examples)
        network = student_of(base)
        objective = CDLMObjective(
            network.role, table, network.eos_token_id, references=references, settings=self.losses,
            corruption=BlockCorruption(
                late=self.late, late_tokens=digits(network.tokenizer) if self.late else (), visited=self.visited
            ),
        )  # fmt: skip
        self.train(network, objective, rank=self.rank)
