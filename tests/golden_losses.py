"""Writes `golden_losses.json`, the record that a change of structure leaves training as it was.

    python tests/golden_losses.py
    python tests/golden_losses.py FILE    # to compare by hand

A case is the loss of each of 20 steps of one objective on a tiny network, with its seeds fixed. Write the record anew
only in a change that is meant to alter training, and say so in its message.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fewstep.decode.diffusion import Diffusion
from fewstep.decode.jacobi import Jacobi
from fewstep.models.medusa import MedusaHeads
from fewstep.models.network import Network
from fewstep.models.roles import RoleName
from fewstep.models.tiny import tiny_network
from fewstep.train.causal_records import collect_jacobi, read_jacobi_table
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.cllm import CLLMObjective, CLLMSettings
from fewstep.train.collect import collect, decode_with, distribution_of, teacher_of
from fewstep.train.corruption import BlockCorruption, Corruption
from fewstep.train.documents import CanvasLengths
from fewstep.train.draft import DraftObjective, DraftSettings
from fewstep.train.examples import Examples
from fewstep.train.lora import LoRASettings, add_gated_lora
from fewstep.train.medusa import MedusaObjective, MedusaSettings
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective, Objective
from fewstep.train.records import PromptRow
from fewstep.train.settings import TrainSettings
from fewstep.train.trainer import train
from fewstep.train.trajectories import read_table

RECORD = Path(__file__).with_suffix(".json")
SETTINGS = TrainSettings(
    max_steps=20, rows=2, row_length=96, learning_rate=3e-3, warmup_steps=4, log_every=1, save_every=None, seed=5
)
ROWS = [
    PromptRow(str(i), [3, 10 + 7 * i % 40, 4], [*range(10 + 7 * i % 40, 13 + 7 * i % 40 + i % 6), 1]) for i in range(24)
]
EXAMPLES = Examples.from_ids([row.prompt_ids for row in ROWS], [row.reference_ids or [] for row in ROWS])

Prepared = tuple[Network, Objective]
"""What is trained, and on what."""


def losses() -> Iterator[tuple[str, list[float]]]:
    """Name and losses of each case."""
    with tempfile.TemporaryDirectory() as folder:
        for name, prepare in CASES.items():
            yield name, losses_of(*prepare(Path(folder)), Path(folder) / "out" / name.replace(" ", "-"))
        network, objective = CASES["sft autoregressive"](Path(folder))
        yield "sft adapter", losses_of(network, objective, Path(folder) / "adapter", lora=LoRASettings(rank=4))
        yield (
            "sft two micro-batches in bfloat16",
            losses_of(
                tiny_network("autoregressive"),
                objective,
                Path(folder) / "halves",
                settings=replace(SETTINGS, rows=1, accumulation=2, precision="bf16"),
            ),
        )
        network = tiny_network("autoregressive")
        objective = MedusaObjective(network.role, EXAMPLES, network.eos_token_id, settings=MedusaSettings(heads=2))
        yield "medusa", losses_of(network, objective, Path(folder) / "heads", heads=MedusaHeads.of(network, 2))


def losses_of(
    network: Network,
    objective: Objective,
    output: Path,
    *,
    settings: TrainSettings = SETTINGS,
    lora: LoRASettings | None = None,
    heads: MedusaHeads | None = None,
) -> list[float]:
    history = train(network, objective, settings, output, lora=lora, heads=heads).history
    assert len(history) == settings.max_steps
    return [line["loss"] for line in history]


def causal(_: Path) -> Prepared:
    network = tiny_network("autoregressive")
    return network, CausalObjective(network.role, EXAMPLES, network.eos_token_id)


def masked(role: RoleName, corruption: Corruption, *, canvases: int = 1, **of_role: str) -> Callable[[Path], Prepared]:
    def prepare(_: Path) -> Prepared:
        network = tiny_network(role, **of_role)  # type: ignore[arg-type]
        canvas = CanvasLengths(block_size=network.role.block_size, weights=(0.0, 0.0, 1.0, 1.0))
        return network, MaskedDiffusionObjective(
            network.role, EXAMPLES, network.eos_token_id, corruption=corruption, canvas=canvas, canvases=canvases
        )

    return prepare


def cdlm(kind: str, settings: CDLMSettings, corruption: BlockCorruption) -> Callable[[Path], Prepared]:
    """A student on what a teacher decoded; `kind`: what of the teacher's distributions is stored."""

    def prepare(folder: Path) -> Prepared:
        teacher, store = tiny_network("bidirectional", head_scale=10), folder / kind
        distribution = distribution_of(teacher, kind, top_k=8)  # type: ignore[arg-type]
        decoder = Diffusion(role=teacher.role, block_size=4, canvas_length=12)
        decoding = decode_with(teacher, decoder, max_new_tokens=12, batch_size=8, distribution=distribution)
        collect(decoding, ROWS, store, teacher=teacher_of(teacher), settings={}, distribution=distribution)
        table, references = read_table(store, teacher)
        student = tiny_network("block_causal", seed=1)
        return student, CDLMObjective(
            student.role, table, student.eos_token_id, references=references, settings=settings, corruption=corruption
        )

    return prepare


def cllm(settings: CLLMSettings) -> Callable[[Path], Prepared]:
    def prepare(folder: Path) -> Prepared:
        network, store = tiny_network("autoregressive", head_scale=20), folder / "jacobi"
        decoder = Jacobi(role=network.role, window=4)
        collect_jacobi(network, ROWS, store, decoder, max_new_tokens=11, batch_size=8, settings={})
        table, references = read_jacobi_table(store, network)
        return network, CLLMObjective(
            network.role, table, network.eos_token_id, references=references, settings=settings
        )

    return prepare


def draft(settings: DraftSettings) -> Callable[[Path], Prepared]:
    """A gated adapter; decoding began drafts at every third token of the texts."""

    def prepare(_: Path) -> Prepared:
        network = add_gated_lora(
            tiny_network("autoregressive", head_scale=20), LoRASettings(rank=4), block_size=settings.block_size
        )
        visited = torch.arange(len(EXAMPLES.completion_ids)) % 3 == 0
        return network, DraftObjective(network, EXAMPLES, visited=visited, settings=settings)

    return prepare


CASES: dict[str, Callable[[Path], Prepared]] = {
    "sft autoregressive": causal,
    "diffusion bidirectional": masked("bidirectional", Corruption(weighting="inverse_ratio")),
    "diffusion leftward": masked(
        "bidirectional",
        Corruption(leftward=0.7, frontier=0.3, late=0.3, late_tokens=(12, 13)),
        context_attention="causal",
        canvases=2,
    ),
    "diffusion block_causal": masked("block_causal", Corruption(frontier=0.2, visited=0.5)),
    "cdlm top_k": cdlm("top_k", CDLMSettings(denoising=0.05), BlockCorruption(visited=0.5)),
    "cdlm hidden": cdlm(
        "hidden",
        CDLMSettings(direction="reverse", later_state="next", temperature=2.0, denoising=0.5, untouched=0.3),
        BlockCorruption(frontier=0.5),
    ),
    "cllm local": cllm(CLLMSettings(goal="local", labels="reference", temperature=1.5)),
    "cllm progressive": cllm(CLLMSettings(noise="progressive", noise_cycle=3, augmented=0.5)),
    "draft": draft(DraftSettings(block_size=4, starts=3)),
    "draft divergence": draft(DraftSettings(block_size=4, starts=2, divergence=1.0, reach=0.5, visited=0.5)),
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else RECORD
    file.write_text(json.dumps(dict(losses()), indent=1) + "\n")
