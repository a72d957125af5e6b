"""Objectives: which documents are packed, which forwards run on them, and which losses follow.

Axes: N = documents of a batch, G = segments, R = packed rows, T = positions, S = scored positions, V = vocabulary.

A diffusion document is `[context | noisy response]`, and for the block-causal role `[context | noisy response | clean
response]`, so that one forward trains all blocks (see `models.masks.Layout`).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.models.masks import Layout
from fewstep.models.roles import Role
from fewstep.train import corruption, losses
from fewstep.train.examples import Examples
from fewstep.train.packing import Packed

CONTEXT, NOISY, CLEAN = 0, 1, 2


@dataclass(frozen=True)
class Batch:
    """Documents of one forward: which examples, their segment lengths, where they lie."""

    examples_N: Tensor
    segments_NG: Tensor
    packed: Packed


@dataclass(frozen=True)
class Loss:
    """`total` is what to descend; `parts` are detached figures for the log."""

    total: Tensor
    parts: dict[str, Tensor]


class Forward(Protocol):
    """The network as objectives see it: logits [S, V] of flat scored rows, with or without gradient."""

    def __call__(
        self, tokens_RT: Tensor, positions_RT: Tensor, layout: Layout, rows_S: Tensor, *, gradient: bool = True
    ) -> Tensor: ...


class Objective(Protocol):
    """What the trainer needs to know. Everything random comes from the generators given.

    `fingerprint` is JSON-able and differs for other data or settings. `segment_lengths` has a row an example [N, G].
    A batch without anything to score has the loss 0, with a gradient.
    """

    role: Role
    num_examples: int

    def to(self, device: torch.device) -> None: ...

    def fingerprint(self) -> dict[str, Any]: ...

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator) -> np.ndarray: ...

    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> Loss: ...


@dataclass(frozen=True, kw_only=True)
class CanvasLengths:
    """Canvas lengths drawn independently of the answer's: a multiple of `block_size`, redrawn (rounded up) if too
    short.

    `weights[i]` is the relative frequency of `i + 1` blocks.
    """

    block_size: int = 32
    weights: tuple[float, ...] = (0.0, 0.1, 0.2, 0.25, 0.15, 0.1, 0.05, 0.15)

    def __post_init__(self) -> None:
        if min(self.weights, default=-1.0) < 0 or not sum(self.weights) > 0:
            raise FewstepError(f"canvas weights are frequencies, not negative and not all 0, got {self.weights}")

    def draw(self, needed_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """At least `needed_N` tokens each: the distribution conditioned on being long enough."""
        chance = np.asarray(self.weights) / np.sum(self.weights)
        needed_blocks = -(-needed_N // self.block_size)
        if needed_blocks.max() > len(chance):
            raise FewstepError(
                f"an answer of {needed_N.max()} tokens exceeds the longest canvas of {len(chance) * self.block_size}"
            )
        cumulative = np.concatenate([[0.0], chance.cumsum()])
        below = cumulative[np.maximum(needed_blocks - 1, 0)]
        quantile = below + rng.random(len(needed_N)) * (1 - below)
        blocks = np.searchsorted(cumulative, quantile, side="right")
        return np.clip(blocks, np.maximum(needed_blocks, 1), len(chance)) * self.block_size


class PackedDocuments:
    """Index arithmetic shared by the objectives: contexts and responses of a batch as packed rows."""

    def __init__(self, role: Role, examples: Examples, batch: Batch, eos_token_id: int) -> None:
        self.role = role
        packed = batch.packed
        document = packed.document_RT.clamp_min(0)
        example = batch.examples_N[document]
        self.packed = packed
        self.document_RT = document
        self.context_RT = batch.segments_NG[document, 0]
        in_context = packed.segment_RT == CONTEXT
        self.positions_RT = torch.where(in_context, packed.index_RT, self.context_RT + packed.index_RT)
        self.is_noisy_RT = packed.real_RT & (packed.segment_RT == NOISY)
        self.completion_lengths_RT = examples.completion_offsets[example + 1] - examples.completion_offsets[example]
        self.inside_completion_RT = ~in_context & (packed.index_RT < self.completion_lengths_RT)
        # Where a response position lies in the flat completions (its last token for positions past the end).
        self.source_RT = examples.completion_offsets[example] + packed.index_RT.minimum(self.completion_lengths_RT - 1)
        response = torch.where(self.inside_completion_RT, examples.completion_ids[self.source_RT], eos_token_id)
        prompt_last = len(examples.prompt_ids) - 1
        prompt = examples.prompt_ids[(examples.prompt_offsets[example] + packed.index_RT).clamp_max(prompt_last)]
        self.clean_RT = torch.where(in_context, prompt, response).long()

    def layout(self) -> Layout:
        """Visibility by the role's block numbers; only a block-causal network has rows apart for noise."""
        blocks = self.role.blocks(self.positions_RT, self.context_RT)
        noisy = self.is_noisy_RT if self.role.name == "block_causal" else torch.zeros_like(self.is_noisy_RT)
        return Layout(self.packed.document_RT, blocks, noisy)

    def block_of_response(self) -> Tensor:
        """Number of the block, from 0, in which a response position lies."""
        return self.packed.index_RT.div(self.role.block_size, rounding_mode="floor")

    def block_units(self, num_documents: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A number for every (document, block) at each position, and a uniform draw for each number."""
        blocks_per_document = self.packed.index_RT.shape[1] // self.role.block_size + 1
        unit_RT = self.document_RT * blocks_per_document + self.block_of_response()
        return unit_RT, corruption.stratified_uniform((num_documents * blocks_per_document,), generator)

    @property
    def settled_RT(self) -> Tensor:
        """Noisy positions whose row, one earlier, does not see their block: decoding's first step finalises them.

        So a state that has anything open in a block has these open, and since their row is a clean one, they can be
        scored in every state.
        """
        shifted = self.role.right_shift_logits and self.role.name == "block_causal"
        return self.is_noisy_RT & (self.packed.index_RT % self.role.block_size == 0) & shifted

    def hide_blocks(
        self, num_documents: int, untouched: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy positions hidden at random with a ratio for each block, those of them to score, and the ratios.

        A share `untouched` of the blocks is hidden whole.
        """
        unit_RT, ratio_U = self.block_units(num_documents, generator)
        _, whole_U = self.block_units(num_documents, generator)
        whole_RT = (whole_U < untouched)[unit_RT]
        hidden_RT = whole_RT | (corruption.random_mask(unit_RT, ratio_U, generator) & ~self.settled_RT)
        hidden_RT = hidden_RT & self.is_noisy_RT
        return hidden_RT, hidden_RT | self.settled_RT, torch.where(whole_RT, 1.0, ratio_U[unit_RT])

    def with_masks(self, hidden_RT: Tensor) -> Tensor:
        """Token ids with the mask token at hidden positions."""
        assert self.role.mask_token_id is not None
        return torch.where(hidden_RT, self.role.mask_token_id, self.clean_RT)

    def rows(self, chosen_RT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flat targets and the flat rows that score them.

        With shifted logits the row is one earlier; a block's first token is then scored by the last row before the
        block, which is a clean one.
        """
        targets = chosen_RT.flatten().nonzero()[:, 0]
        if not self.role.right_shift_logits:
            return targets, targets
        index = self.packed.index_RT.flatten()[targets]
        if self.role.name != "block_causal":
            return targets, targets - 1
        canvas = batch.segments_NG[self.document_RT.flatten()[targets], NOISY]
        at_border = (index % self.role.block_size == 0) & (index > 0)
        return targets, torch.where(at_border, targets + canvas - 1, targets - 1)


def check_packable(role: Role) -> None:
    """FewstepError for a kind of attention that the packed forward does not train."""
    if role.name == "block_causal" and role.context_attention == "block_causal":
        raise FewstepError(
            "training with context_attention=block_causal is not supported, since its first block holds a part of the "
            "context; use bidirectional or causal"
        )


class CausalObjective:
    """Next-token cross-entropy on completions (supervised fine-tuning of a causal model)."""

    def __init__(self, role: Role, examples: Examples, eos_token_id: int) -> None:
        if role.name != "autoregressive":
            raise FewstepError(f"causal fine-tuning needs the role autoregressive, not {role.name}")
        self.role = role
        self.examples = examples
        self.eos_token_id = eos_token_id
        self.num_examples = len(examples)
        self._lengths = examples.lengths()

    def to(self, device: torch.device) -> None:
        self.examples = self.examples.to(device)

    def fingerprint(self) -> dict[str, Any]:
        return {"examples": self.examples.fingerprint()}

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self._lengths[examples_N]

    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> Loss:
        documents = PackedDocuments(self.role, self.examples, batch, self.eos_token_id)
        targets = documents.is_noisy_RT.flatten().nonzero()[:, 0]
        logits = forward(documents.clean_RT, documents.positions_RT, documents.layout(), targets - 1)
        loss = losses.cross_entropy(logits, documents.clean_RT.flatten()[targets])
        return Loss(loss, {"cross_entropy": loss.detach()})


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """How responses are hidden.

    For a block-causal network every block has its own random ratio, and a share `untouched` is hidden whole, which is
    the state that decoding meets in every block. The rest is for a bidirectional teacher: `leftward` is the share of
    documents shown as in block-by-block decoding: earlier blocks open, later ones hidden, loss on the active one, of
    which `frontier` (a share of these documents) shows the part before a random point and the rest hides positions at
    random. All other documents hide each position with one random ratio (LLaDA, arXiv 2502.09992).

    `weighting`: `uniform` averages over hidden positions; `inverse_ratio` is the likelihood bound's 1/t.
    """

    leftward: float = 0.0
    frontier: float = 0.0
    untouched: float = 0.1
    weighting: Literal["uniform", "inverse_ratio"] = "uniform"

    def __post_init__(self) -> None:
        for name in ("leftward", "frontier", "untouched"):
            if not 0 <= getattr(self, name) <= 1:
                raise FewstepError(f"{name} is a share of documents between 0 and 1, got {getattr(self, name)}")
        if self.weighting not in ("uniform", "inverse_ratio"):
            raise FewstepError(f"unknown weighting {self.weighting!r}; choose uniform or inverse_ratio")


class MaskedDiffusionObjective:
    """Masked denoising on references: trains a bidirectional teacher, or a block-causal network (plain block
    diffusion).
    """

    def __init__(
        self,
        role: Role,
        examples: Examples,
        eos_token_id: int,
        *,
        corruption: Corruption | None = None,
        canvas: CanvasLengths | None = None,
    ) -> None:
        if role.name == "autoregressive":
            raise FewstepError("masked diffusion needs the role bidirectional or block_causal, not autoregressive")
        check_packable(role)
        self.role = role
        self.examples = examples
        self.eos_token_id = eos_token_id
        self.corruption = corruption or Corruption()
        self.canvas = canvas or CanvasLengths(block_size=role.block_size)
        self.num_examples = len(examples)
        self._lengths = examples.lengths()

    def to(self, device: torch.device) -> None:
        self.examples = self.examples.to(device)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "examples": self.examples.fingerprint(),
            "corruption": asdict(self.corruption),
            "canvas": asdict(self.canvas),
        }

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        context, completion = self._lengths[examples_N].T
        if self.role.name == "block_causal":
            canvas = whole_blocks(completion, self.role.block_size)
            return np.stack([context, canvas, canvas], 1)
        return np.stack([context, self.canvas.draw(completion, rng)], 1)

    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> Loss:
        documents = PackedDocuments(self.role, self.examples, batch, self.eos_token_id)
        hidden_RT, scored_RT, ratio_RT = self._hide(documents, len(batch.examples_N), generator)
        noisy_RT = documents.with_masks(hidden_RT)
        targets, rows = documents.rows(scored_RT, batch)
        logits = forward(noisy_RT, documents.positions_RT, documents.layout(), rows)
        if not len(targets):
            return Loss(logits.sum(), {"cross_entropy": logits.sum().detach()})
        weights = None
        if self.corruption.weighting == "inverse_ratio":
            weights = 1 / ratio_RT.flatten()[targets].clamp_min(1e-3)
        loss = losses.cross_entropy(logits, documents.clean_RT.flatten()[targets], weights)
        return Loss(loss, {"cross_entropy": loss.detach()})

    def _hide(
        self, documents: PackedDocuments, num_documents: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden positions, those of them that are scored, and the mask ratio at each position."""
        if self.role.name == "block_causal":
            return documents.hide_blocks(num_documents, self.corruption.untouched, generator)
        ratio_N, leftward_N, frontier_N, active_N = (
            corruption.stratified_uniform((num_documents,), generator) for _ in range(4)
        )
        hidden_RT = corruption.random_mask(documents.document_RT, ratio_N, generator)
        scored_RT = torch.ones_like(hidden_RT)
        if self.corruption.leftward:
            leftward_RT = (leftward_N < self.corruption.leftward)[documents.document_RT]
            # The active block is one that decoding visits: up to the one that holds the end-of-text.
            visited_RT = (documents.completion_lengths_RT - 1).div(self.role.block_size, rounding_mode="floor") + 1
            active_RT = (active_N[documents.document_RT] * visited_RT).long()
            block_RT = documents.block_of_response()
            from_left_RT = (frontier_N < self.corruption.frontier)[documents.document_RT] & leftward_RT
            open_RT = ((1 - ratio_N) * self.role.block_size).long()[documents.document_RT]
            after_RT = documents.packed.index_RT % self.role.block_size >= open_RT
            hidden_RT = torch.where(from_left_RT, after_RT, hidden_RT)
            hidden_RT = torch.where(leftward_RT, corruption.leftward_mask(block_RT, active_RT, hidden_RT), hidden_RT)
            scored_RT = ~leftward_RT | (block_RT == active_RT)
        hidden_RT = hidden_RT & documents.is_noisy_RT
        return hidden_RT, hidden_RT & scored_RT, ratio_N[documents.document_RT]


def whole_blocks(lengths_N: np.ndarray, block_size: int) -> np.ndarray:
    """Lengths rounded up to whole blocks."""
    return -(-lengths_N // block_size) * block_size
