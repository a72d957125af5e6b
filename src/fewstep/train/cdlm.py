"""The CDLM objective: distillation, consistency and masked denoising on a teacher's trajectories (arXiv 2511.19269).

Axes as in `objectives.py`; P = flat positions of all stored trajectories, K = stored top tokens, D = hidden width.

States are rebuilt, not stored: after k of a block's positions were finalised, a position is open if its step rank is among the block's k
lowest. Every block of a document draws its own state; all blocks train in one packed forward. Consistency is within the block: y* is a later
state of the same block, scored by a second packed forward without gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.models.roles import Role
from fewstep.train import corruption, losses
from fewstep.train.examples import Examples
from fewstep.train.objectives import (
    Batch,
    Forward,
    Loss,
    PackedDocuments,
    check_packable,
    whole_blocks,
)

Distillation = Literal["forward", "reverse", "hard"]
LaterState = Literal["next", "uniform", "last"]


@dataclass(frozen=True)
class TopDistributions:
    """The teacher's distribution at each stored position: top-K ids and log-probabilities [P, K], log of the mass outside them [P]."""

    ids_PK: Tensor
    logp_PK: Tensor
    tail_P: Tensor

    def to(self, device: torch.device) -> "TopDistributions":
        return TopDistributions(self.ids_PK.to(device), self.logp_PK.to(device), self.tail_P.to(device))

    def divergence(self, at_N: Tensor, student_NV: Tensor, direction: str) -> Tensor:
        """Mean divergence in nats at the stored positions `at_N`."""
        return losses.divergence_from_top(
            self.ids_PK[at_N].long(), self.logp_PK[at_N], self.tail_P[at_N], student_NV, direction=direction
        )


@dataclass(frozen=True)
class HiddenDistributions:
    """The teacher's hidden row after the final norm at each stored position [P, D], and the teacher's own head."""

    hidden_PD: Tensor
    head: Callable[[Tensor], Tensor]

    def to(self, device: torch.device) -> "HiddenDistributions":
        return HiddenDistributions(self.hidden_PD.to(device), self.head)

    def divergence(self, at_N: Tensor, student_NV: Tensor, direction: str) -> Tensor:
        """Mean divergence in nats at the stored positions `at_N`."""
        with torch.no_grad():
            teacher_NV = self.head(self.hidden_PD[at_N])
        return losses.divergence(teacher_NV, student_NV, direction=direction)


@dataclass(frozen=True)
class TrajectoryTable:
    """Trajectories as flat tensors: prompts and final ids, and each position's step rank [P] (0 = not recorded)."""

    examples: Examples
    rank_P: Tensor
    distributions: TopDistributions | HiddenDistributions | None

    def __post_init__(self) -> None:
        if len(self.rank_P) != len(self.examples.completion_ids):
            raise ValueError(f"{len(self.rank_P)} ranks for {len(self.examples.completion_ids)} stored positions")


def blockwise_ranks(offsets: np.ndarray, rank_P: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each stored position p, in block b at index j: the j-th lowest rank of b, and how many positions of b were recorded.

    Unrecorded positions (rank 0) sort last. Both results are [P].
    """
    lengths = np.diff(offsets)
    document_P = np.repeat(np.arange(len(lengths)), lengths)
    index_P = np.arange(len(rank_P)) - np.repeat(offsets[:-1], lengths)
    blocks_per_document = -(-int(lengths.max()) // block_size)
    block_P = document_P * blocks_per_document + index_P // block_size
    sortable_P = np.where(rank_P > 0, rank_P, np.iinfo(np.int32).max)
    sorted_P = sortable_P[np.lexsort((sortable_P, block_P))]
    count_P = np.bincount(block_P, weights=rank_P > 0).astype(np.int64)[block_P]
    return sorted_P.astype(np.int64), count_P


@dataclass(frozen=True, kw_only=True)
class CDLMSettings:
    """Weights of the three losses and how each is formed. FewstepError for a consistency loss without an anchor, unless forced."""

    distillation: float = 1.0
    consistency: float = 0.5
    denoising: float = 0.01
    direction: Distillation = "forward"
    later_state: LaterState = "uniform"
    temperature: float = 1.0
    allow_unanchored: bool = False

    def __post_init__(self) -> None:
        for name in ("distillation", "consistency", "denoising"):
            if getattr(self, name) < 0:
                raise FewstepError(f"the weight of {name} must not be negative, got {getattr(self, name)}")
        if self.distillation + self.consistency + self.denoising == 0:
            raise FewstepError("all three loss weights are 0; there is nothing to learn")
        if self.direction not in get_args(Distillation):
            raise FewstepError(f"unknown direction {self.direction!r}; choose {', '.join(get_args(Distillation))}")
        if self.later_state not in get_args(LaterState):
            raise FewstepError(f"unknown later_state {self.later_state!r}; choose {', '.join(get_args(LaterState))}")
        if self.consistency and not self.distillation and not self.denoising and not self.allow_unanchored:
            raise FewstepError(
                "a consistency loss alone collapses; add distillation or denoising, or force it with allow_unanchored"
            )


class CDLMObjective:
    """Trains a block-causal student on trajectories, with masked denoising on references as separate documents."""

    def __init__(
        self,
        role: Role,
        table: TrajectoryTable,
        eos_token_id: int,
        *,
        references: Examples | None = None,
        settings: CDLMSettings | None = None,
    ) -> None:
        if role.name != "block_causal":
            raise FewstepError(f"CDLM trains a block_causal student, not {role.name}")
        check_packable(role)
        self.settings = settings or CDLMSettings()
        if self.settings.denoising and references is None:
            raise FewstepError("the denoising loss needs reference answers; give references or set its weight to 0")
        if self.settings.distillation and self.settings.direction != "hard" and table.distributions is None:
            raise FewstepError("distillation needs the teacher's distributions, which these trajectories do not hold")
        self.role = role
        self.eos_token_id = eos_token_id
        self.num_trajectories = len(table.examples)
        offsets = table.examples.completion_offsets.cpu().numpy()
        sorted_P, count_P = blockwise_ranks(offsets, table.rank_P.cpu().numpy(), role.block_size)
        self.examples = concatenate(table.examples, references) if self.settings.denoising and references else table.examples
        # References follow the trajectories in the flat completions; their ranks are never read as recorded.
        self.rank_P = _padded(table.rank_P.long(), len(self.examples.completion_ids))
        self.sorted_P = _padded(torch.from_numpy(sorted_P), len(self.examples.completion_ids))
        self.count_P = _padded(torch.from_numpy(count_P), len(self.examples.completion_ids))
        self.distributions = table.distributions
        self.num_examples = len(self.examples)
        self._lengths = self.examples.lengths()

    def to(self, device: torch.device) -> None:
        self.examples = self.examples.to(device)
        self.rank_P, self.sorted_P = self.rank_P.to(device), self.sorted_P.to(device)
        self.count_P = self.count_P.to(device)
        if self.distributions is not None:
            self.distributions = self.distributions.to(device)

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        context, completion = self._lengths[examples_N].T
        canvas = whole_blocks(completion, self.role.block_size)
        return np.stack([context, canvas, canvas], 1)

    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> Loss:
        settings, num_documents = self.settings, len(batch.examples_N)
        documents = PackedDocuments(self.role, self.examples, batch, self.eos_token_id)
        states = _BlockStates(self, documents, batch)
        unit_RT, draw_U = documents.block_units(num_documents, generator)
        cut_RT = (draw_U[unit_RT] * states.count_RT).long()
        hidden_RT = states.hidden_after(cut_RT)
        distilled_RT = hidden_RT & states.recorded_RT
        _, ratio_U = documents.block_units(num_documents, generator)
        denoised_RT = corruption.random_mask(unit_RT, ratio_U, generator) & states.reference_RT & documents.is_noisy_RT
        targets, rows = documents.rows(distilled_RT | denoised_RT, batch)
        layout = documents.layout()
        logits = forward(
            documents.with_masks(hidden_RT | denoised_RT), documents.positions_RT, layout, rows
        )  # fmt: skip
        is_distilled = distilled_RT.flatten()[targets]
        truth = documents.clean_RT.flatten()[targets]
        parts: dict[str, Tensor] = {}
        if settings.distillation:
            student = logits[is_distilled]
            if settings.direction == "hard":
                parts["distillation"] = losses.cross_entropy(student, truth[is_distilled])
            else:
                assert self.distributions is not None
                stored = documents.source_RT.flatten()[targets[is_distilled]]
                parts["distillation"] = self.distributions.divergence(stored, student, settings.direction)
        if settings.denoising:
            parts["denoising"] = losses.cross_entropy(logits[~is_distilled], truth[~is_distilled])
        if settings.consistency:
            _, later_draw_U = documents.block_units(num_documents, generator)
            later_RT = corruption.later_state(cut_RT, states.count_RT, settings.later_state, later_draw_U[unit_RT])
            still_hidden_RT = states.hidden_after(later_RT)
            shared_RT = still_hidden_RT & states.recorded_RT & (later_RT < states.count_RT)
            shared, shared_rows = documents.rows(shared_RT, batch)
            target = forward(
                documents.with_masks(still_hidden_RT | denoised_RT), documents.positions_RT, layout, shared_rows, gradient=False
            )
            place = torch.zeros_like(distilled_RT.flatten(), dtype=torch.long)
            place[targets] = torch.arange(len(targets), device=targets.device)
            parts["consistency"] = losses.divergence(target, logits[place[shared]], temperature=settings.temperature)
        total = sum((getattr(settings, name) * part for name, part in parts.items()), torch.zeros((), device=logits.device))
        return Loss(total, {name: part.detach() for name, part in parts.items()})


class _BlockStates:
    """Step ranks at packed positions, and which positions a state of the block hides."""

    def __init__(self, objective: CDLMObjective, documents: PackedDocuments, batch: Batch) -> None:
        self.reference_RT = batch.examples_N[documents.document_RT] >= objective.num_trajectories
        self._candidate_RT = documents.is_noisy_RT & ~self.reference_RT
        inside_RT = documents.inside_completion_RT & self._candidate_RT
        self._rank_RT = torch.where(inside_RT, objective.rank_P[documents.source_RT], 0)
        self.recorded_RT = self._rank_RT > 0
        self.count_RT = torch.where(self._candidate_RT, objective.count_P[documents.source_RT], 0)
        index_in_block = documents.packed.index_RT % objective.role.block_size
        self._block_source_RT = objective.examples.completion_offsets[
            batch.examples_N[documents.document_RT]
        ] + (documents.packed.index_RT - index_in_block)  # fmt: skip
        self._sorted_P = objective.sorted_P

    def hidden_after(self, count_RT: Tensor) -> Tensor:
        """Positions still hidden once the block's `count_RT` first-finalised positions are open; unrecorded ones always are.

        Positions that were finalised in one step open together.
        """
        at_RT = (self._block_source_RT + count_RT - 1).clamp(0, len(self._sorted_P) - 1)
        cut_rank_RT = torch.where(count_RT > 0, self._sorted_P[at_RT], 0)
        return self._candidate_RT & ~(self.recorded_RT & (self._rank_RT <= cut_rank_RT))


def concatenate(first: Examples, second: Examples) -> Examples:
    """The examples of both, those of `first` first."""
    return Examples(
        torch.cat([first.prompt_ids, second.prompt_ids]),
        torch.cat([first.prompt_offsets, second.prompt_offsets[1:] + first.prompt_offsets[-1]]),
        torch.cat([first.completion_ids, second.completion_ids]),
        torch.cat([first.completion_offsets, second.completion_offsets[1:] + first.completion_offsets[-1]]),
    )


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)))
