"""What the stages of several recipes share: options, networks, settings of a GPU, and where a process stands."""

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from word_problems import MAX_ANSWER

from fewstep.engine.language_model import LanguageModel
from fewstep.json_files import read_json, write_json_whole
from fewstep.measure.evaluate import evaluate
from fewstep.models.names import BUNDLED
from fewstep.models.network import Network
from fewstep.models.roles import Role
from fewstep.tasks.gsm_symbolic import problems
from fewstep.train.trainer import Evaluate, TrainSettings

Runs = Annotated[Path, typer.Option(help="folder for everything this recipe makes")]

Leftward = Annotated[float, typer.Option(help="share of rows shown as in block-by-block decoding")]
Frontier = Annotated[float, typer.Option(help="share of these that are open up to a point")]
Late = Annotated[float, typer.Option(help="share of these that hide their digits longest")]
Visited = Annotated[float, typer.Option(help="share of these that the network first goes on with by itself")]
Canvases = Annotated[int, typer.Option(help="states of an answer that share its prompt")]
NumGSM8K = Annotated[int, typer.Option(help="of GSM8K's training problems, if they are given")]
NumSymbolic = Annotated[int, typer.Option(help="of GSM-Symbolic")]
Solved = Annotated[bool, typer.Option(help="keep only what the teacher solves")]
Own = Annotated[str | None, typer.Option(help="folder of a student's own states, to train on as well")]
BlocksLate = Annotated[float, typer.Option(help="share of the references' blocks that hide their digits longest")]
BlocksVisited = Annotated[float, typer.Option(help="share of them that the network first goes on with by itself")]

BLOCK = 32


# --- networks and settings ---


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(BUNDLED / "gsm-tokenizer")


def fresh_network(name: str, device: str, *, layers: int = 12, like: Network | None = None) -> Network:
    """Layers of width 256: the bundled shape (9.6 M parameters with 12 of them), or that with the vocabulary and the
    positions of `like`.
    """
    torch.manual_seed(0)
    tok = tokenizer() if like is None else like.tokenizer
    config = LlamaConfig(
        vocab_size=2048 if like is None else like.vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512 if like is None else like.max_positions,
        tie_word_embeddings=True,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        bos_token_id=tok.bos_token_id,
    )
    return Network(LlamaForCausalLM(config).to(device), Role(name="autoregressive", block_size=BLOCK), tok, name=name)


def accuracy(count: int, **settings: Any) -> Evaluate:
    """An `evaluate` callable: the share of the first development problems solved, and tokens per forward."""
    items = problems("dev", count)

    def evaluate_network(network: Network, step: int) -> dict[str, float]:
        report = evaluate(
            LanguageModel(network), items, batch_size=count, warm_up=False, max_new_tokens=MAX_ANSWER, **settings
        )
        print(f"sample at step {step}: {report.records[0].text!r}", flush=True)
        return {"accuracy": report.accuracy, "tokens_per_forward": report.tokens_per_forward}

    return evaluate_network


def gpu_settings(**values: Any) -> TrainSettings:
    """What all runs on a GPU share."""
    cuda = torch.cuda.is_available()
    return TrainSettings(
        precision="bf16" if cuda else "no", weights_dtype="bfloat16" if cuda else "float32", compiled=cuda, **values
    )


def digits(tok: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(tok.convert_tokens_to_ids(list("0123456789")))


# --- files and processes ---


def change_json(path: Path, **values: Any) -> None:
    """Set these keys of a JSON file."""
    write_json_whole(path, {**read_json(path), **values})


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
