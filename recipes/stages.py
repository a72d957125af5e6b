"""What recipes share: a stage as a command, fresh networks, settings of a GPU, and where a process stands."""

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from annotated_types import Ge, Gt, Le
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from word_problems import MAX_ANSWER

from fewstep.measure.evaluate import solved_share
from fewstep.models.fresh import fresh_network
from fewstep.models.load import load_network
from fewstep.models.names import BUNDLED
from fewstep.models.network import Network
from fewstep.tasks.gsm_symbolic import problems
from fewstep.train.lora import LoRASettings
from fewstep.train.objectives import Objective
from fewstep.train.trainer import Evaluate, TrainSettings, train
from fewstep.values import Count, check_fields

Runs = Annotated[Path, typer.Option(help="folder for everything this recipe makes")]
Rank = Annotated[int, Ge(0), Le(1 << 16), "Of the LoRA adapters; 0 trains all weights."]
AtLeast0 = Annotated[int, Ge(0), Le(1 << 24)]

BLOCK = 32


# --- stages and their commands ---


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """One command: its fields, and those of settings classes among them, are the options, its values their defaults."""

    runs: Annotated[Path, "Folder for everything that this recipe makes."]

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def run(self) -> None:
        """Do what is missing."""

    def found(self, name: str | Path) -> str | Path:
        """What is meant by the name of a model or folder: one under --runs, or else what the name says by itself."""
        return self.runs / name if (self.runs / name).exists() else name


@dataclass(frozen=True, kw_only=True)
class Training(Stage):
    """A stage that trains a network and leaves its folder; what is there is left alone, what was cut off goes on."""

    finished: ClassVar[str] = "config.json"  # the file that tells that the folder is whole
    name: Annotated[str, "Folder under --runs for the result."]
    steps: Count
    rows: Annotated[Count, "Packed rows of a step, in each process."]
    row_length: Count = 2048
    learning_rate: Annotated[float, Gt(0), Le(1e3)]
    warmup_steps: Count = 50
    log_every: Count = 50
    seed: Annotated[int, Ge(0), Le((1 << 32) - 1)] = 0
    dev: Annotated[Count, "Development problems that the result answers."]

    @property
    def output(self) -> Path:
        return self.runs / self.name

    def run(self) -> None:
        if not is_there(self.output / self.finished):
            self.fit()

    @abstractmethod
    def fit(self) -> None:
        """Train, from the newest checkpoint if there is one."""

    def settings(self, **others: Any) -> TrainSettings:
        return gpu_settings(
            max_steps=self.steps, rows=self.rows, row_length=self.row_length, learning_rate=self.learning_rate,
            warmup_steps=min(self.warmup_steps, self.steps), log_every=self.log_every, seed=self.seed, **others,
        )  # fmt: skip

    def train(self, network: Network, objective: Objective, *, rank: int = 0, **answering: Any) -> None:
        """The trained network, or an adapter of this rank, in the output folder; `answering`: settings for `dev`."""
        lora = LoRASettings(rank=rank, alpha=rank) if rank else None
        settings = self.settings(evaluate_every=self.steps)
        train(network, objective, settings, self.output, lora=lora, evaluate=accuracy(self.dev, **answering))


@dataclass(frozen=True, kw_only=True)
class FineTuning(Training):
    """A training that starts from a model."""

    source: Annotated[str, "What to start from: a folder under --runs, a bundled name, or another folder."]

    def load(self) -> Network:
        """The source in float32, to be trained."""
        return load_network(self.found(self.source), dtype="float32", device=device())


# --- networks and settings ---


def bundled_shape(name: str, device: str, *, layers: int = 12, like: Network | None = None) -> Network:
    """Fresh weights of width 256: the bundled shape (9.6 M parameters with 12 layers), or that with the vocabulary and
    the positions of `like`.
    """
    tok = PreTrainedTokenizerFast.from_pretrained(BUNDLED / "gsm-tokenizer") if like is None else like.tokenizer
    return fresh_network(
        tok, width=256, inner_width=640, layers=layers, vocab_size=2048 if like is None else like.vocab_size,
        max_positions=512 if like is None else like.max_positions, block_size=BLOCK, device=device, name=name,
    )  # fmt: skip


def accuracy(count: int, **settings: Any) -> Evaluate:
    """An `evaluate` callable: see `solved_share`, on the first development problems."""
    return solved_share(problems("dev", count), max_new_tokens=MAX_ANSWER, engine="off", **settings)


def gpu_settings(**values: Any) -> TrainSettings:
    """What all runs on a GPU share."""
    cuda = torch.cuda.is_available()
    return TrainSettings(
        precision="bf16" if cuda else "no", weights_dtype="bfloat16" if cuda else "float32", compiled=cuda, **values
    )


def digits(tok: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tok.convert_tokens_to_ids(list("0123456789")))


# --- files and processes ---


def worker() -> tuple[int, int]:
    """Which of how many processes this is, (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_there(path: Path) -> bool:
    """Whether a stage has finished already, by the file or folder that it leaves; says so."""
    if found := path.exists():
        print(f"{path} is there", flush=True)
    return found


def device() -> str:
    """This process's own GPU under torchrun."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
