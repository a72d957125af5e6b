"""The CDLM objective: distillation, consistency and masked denoising on a teacher's trajectories (arXiv 2511.19269).

Axes as in `objectives.py`; P = flat positions of all stored trajectories, K = stored top tokens, D = hidden width.

States are rebuilt, not stored: before a pass, a position is masked unless its step rank is lower. Every block of a
document draws its own state; all blocks train in one packed forward. Consistency is within the block: y* is a later
state of the same block, scored by a second packed forward without gradient.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt, Le
from torch import Tensor

from fewstep.decode.decoder import whole_blocks
from fewstep.errors import FewstepError
from fewstep.models.roles import Role
from fewstep.train import corruption, losses
from fewstep.train.corruption import BlockCorruption
from fewstep.train.documents import Batch, Forward, Inputs, PackedDocuments, Unmasking, check_packable
from fewstep.train.examples import Examples, fingerprint
from fewstep.train.objectives import Loss
from fewstep.train.trajectory_table import HiddenDistributions, TopDistributions, TrajectoryTable
from fewstep.values import Share, Weight, check_fields

Distillation = Literal["forward", "reverse", "hard"]
LaterState = Literal["next", "uniform", "last"]


@dataclass(frozen=True)
class BlockOrders:
    """The order in which each block's positions were finalised; [P] each, for a position p at index j of its block.

    `rank_P`: the j-th lowest rank of the block; unrecorded positions (rank 0) sort last. `after_P`: how many positions
    of the block were finalised by the pass of that rank or before. `count_P`: how many were recorded at all.
    """

    rank_P: Tensor
    after_P: Tensor
    count_P: Tensor

    @classmethod
    def of(cls, offsets: np.ndarray, rank_P: np.ndarray, block_size: int) -> "BlockOrders":
        """From the ranks of records that lie at `offsets`."""
        lengths = np.diff(offsets)
        index_P = (np.arange(len(rank_P)) - np.repeat(offsets[:-1], lengths)) % block_size
        block_P = np.cumsum(index_P == 0) - 1
        sortable_P = np.where(rank_P > 0, rank_P.astype(np.int64), np.iinfo(np.int32).max)
        sorted_P = sortable_P[np.lexsort((sortable_P, block_P))]
        is_last_P = (np.diff(sorted_P, append=-1) != 0) | (np.diff(block_P, append=-1) != 0)
        last = np.flatnonzero(is_last_P)
        after_P = index_P[last[np.searchsorted(last, np.arange(len(rank_P)))]] + 1
        count_P = np.bincount(block_P, weights=rank_P > 0)[block_P]
        return cls(*(torch.from_numpy(values.astype(np.int64)) for values in (sorted_P, after_P, count_P)))

    def map(self, function: Callable[[Tensor], Tensor]) -> "BlockOrders":
        return BlockOrders(function(self.rank_P), function(self.after_P), function(self.count_P))


@dataclass(frozen=True, kw_only=True)
class CDLMSettings:
    """Weights of the three losses and how each is formed.

    A share `untouched` of the trajectories' blocks is fully masked, which is how every block looks when decoding begins
    with it; the other blocks draw their state uniformly (as published, with `untouched` 0). FewstepError for a
    consistency loss without a second loss that anchors it, unless `allow_unanchored` is set.
    """

    distillation: Annotated[Weight, "Weight of the divergence from the teacher's distributions."] = 1.0
    consistency: Annotated[Weight, "Weight of the divergence from the student's own later states."] = 0.5
    denoising: Annotated[Weight, "Weight of masked denoising on the reference answers."] = 0.01
    direction: Annotated[
        Distillation, "Distillation by KL(teacher, student), by KL(student, teacher), or on the teacher's tokens."
    ] = "forward"
    later_state: Annotated[
        LaterState, "The later state of a block: one token further, any, or the last that has a mask."
    ] = "uniform"
    temperature: Annotated[float, Gt(0), Le(1e6), "Temperature of both distributions in the consistency loss."] = 1.0
    untouched: Annotated[Share, "Share of the trajectories' blocks that are shown fully masked."] = 0.1
    allow_unanchored: Annotated[bool, "Allow a consistency loss without another loss, which may collapse."] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.distillation + self.consistency + self.denoising == 0:
            raise FewstepError("all three loss weights are 0; there is nothing to learn")
        if self.consistency and not self.distillation and not self.denoising and not self.allow_unanchored:
            raise FewstepError(
                "a consistency loss alone may collapse; add distillation or denoising, or force it with "
                "allow_unanchored"
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
        corruption: BlockCorruption | None = None,
    ) -> None:
        """`corruption`: how the blocks of references are masked. FewstepError if the role, the table and the settings
        do not fit each other.
        """
        if role.name != "block_causal":
            raise FewstepError(f"CDLM trains a block_causal student, not {role.name}")
        check_packable(role)
        self.settings = settings or CDLMSettings()
        self.corruption = corruption or BlockCorruption()
        if self.settings.denoising and references is None:
            raise FewstepError(
                "the denoising loss needs reference answers, which these trajectories do not hold; collect them from "
                "rows with a completion, or set denoising to 0"
            )
        if self.settings.distillation and self.settings.direction != "hard" and table.distributions is None:
            raise FewstepError("distillation needs the teacher's distributions, which these trajectories do not hold")
        if self.settings.distillation and self.settings.direction == "hard" and table.of_student:
            raise FewstepError("direction hard would teach the student its own tokens; choose forward or reverse")
        self.role = role
        self.eos_token_id = eos_token_id
        self.num_trajectories = len(table.examples)
        offsets = table.examples.completion_offsets.cpu().numpy()
        orders = BlockOrders.of(offsets, table.rank_P.cpu().numpy(), role.block_size)
        self.examples = (
            Examples.joined([table.examples, references]) if self.settings.denoising and references else table.examples
        )
        # References follow the trajectories in the flat completions; their ranks are never read as recorded.
        self.rank_P = _padded(table.rank_P.long(), len(self.examples.completion_ids))
        self.orders = orders.map(lambda values_P: _padded(values_P, len(self.examples.completion_ids)))
        self.distributions = table.distributions
        self.num_examples = len(self.examples)
        self._lengths = self.examples.lengths()

    def fingerprint(self) -> dict[str, Any]:
        return {
            "cdlm": asdict(self.settings),
            "corruption": asdict(self.corruption),
            "examples": self.examples.fingerprint(),
            "ranks": fingerprint(self.rank_P),
            "distributions": self.distributions.fingerprint() if self.distributions else None,
        }

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        context, completion = self._lengths[examples_N].T
        canvas = whole_blocks(completion, self.role.block_size)
        return np.stack([context, canvas, canvas], 1)

    def prepare(self, batch: Batch, generator: torch.Generator) -> "CDLMBatch":
        settings, num_documents = self.settings, len(batch.examples_N)
        documents = PackedDocuments(self.role, self.examples, batch, self.eos_token_id)
        states = _BlockStates(self, documents, batch)
        unit_RT, cut_U = documents.block_units(num_documents, generator)
        _, whole_U = documents.block_units(num_documents, generator)
        state_RT = torch.where((whole_U < settings.untouched)[unit_RT], 0, (cut_U[unit_RT] * states.count_RT).long())
        masked_RT = states.masked_in(state_RT)
        distilled_RT = (masked_RT | (documents.settled_RT & ~states.reference_RT)) & states.recorded_RT
        references = documents.mask_blocks(num_documents, self.corruption, generator)
        reference_masked_RT = references.masked_RT & states.reference_RT
        denoised_RT = references.scored_RT & states.reference_RT
        targets, rows = documents.rows(distilled_RT | denoised_RT, batch)

        def inputs(masked_RT: Tensor, rows: Tensor) -> Inputs:
            noisy_RT = documents.with_masks(masked_RT | reference_masked_RT)
            return Inputs(noisy_RT, documents.positions_RT, documents.layout(), rows)

        is_distilled_S = distilled_RT.flatten()[targets]
        distilled, denoised = is_distilled_S.nonzero()[:, 0], (~is_distilled_S).nonzero()[:, 0]
        truth_S = documents.clean_RT.flatten()[targets]
        goals = None
        if settings.distillation and settings.direction != "hard" and self.distributions is not None:
            goals = self.distributions.at(documents.source_RT.flatten()[targets[distilled]])
        later_inputs, later_S = None, targets[:0]
        if settings.consistency:
            _, later_U = documents.block_units(num_documents, generator)
            later_RT = corruption.later_state(
                states.last_of_pass(state_RT), states.count_RT, settings.later_state, later_U[unit_RT]
            )
            still_masked_RT = states.masked_in(later_RT)
            scored_RT = still_masked_RT & states.recorded_RT & (later_RT < states.count_RT)
            later, later_rows = documents.rows(scored_RT, batch)
            later_inputs = inputs(still_masked_RT, later_rows)
            # What is masked in a later state is masked in this one too, so its logits are at hand.
            later_S = torch.searchsorted(targets, later)
        unmasking = None
        if settings.denoising and self.corruption.visited:
            references = references._replace(goes_on_RT=references.goes_on_RT & states.reference_RT)
            unmasking = documents.unmasking(references, targets, self.corruption.visited, generator)
        return CDLMBatch(
            inputs=inputs(masked_RT, rows),
            truth_S=truth_S,
            unmasking=unmasking,
            distilled=distilled,
            goals_D=goals,
            denoised=denoised,
            later_inputs=later_inputs,
            later=later_S,
        )

    def loss(self, forward: Forward, prepared: "CDLMBatch") -> Loss:
        settings, inputs, truth_S = self.settings, prepared.inputs, prepared.truth_S
        left_S = torch.ones_like(truth_S, dtype=torch.float)
        if prepared.unmasking is not None:
            inputs, left_S = prepared.unmasking.go_on(forward, inputs, truth_S)
        logits_SV = forward(*inputs)
        parts: dict[str, Tensor] = {}
        if settings.distillation:
            parts["distillation"] = self._distillation(logits_SV[prepared.distilled], prepared)
        if settings.denoising:
            at = prepared.denoised
            parts["denoising"] = _hard(logits_SV[at], truth_S[at], left_S[at])
        if prepared.later_inputs is not None:
            goal_LV = forward(*prepared.later_inputs, gradient=False)
            student_LV = logits_SV[prepared.later]
            parts["consistency"] = (
                losses.divergence(goal_LV, student_LV, temperature=settings.temperature)
                if len(goal_LV)
                else student_LV.sum()
            )
        zero = torch.zeros((), device=logits_SV.device)
        total = sum((getattr(settings, name) * part for name, part in parts.items()), zero)
        return Loss(total, {name: part.detach() for name, part in parts.items()})

    def _distillation(self, student_DV: Tensor, prepared: "CDLMBatch") -> Tensor:
        """Against the teacher's distributions, or against the tokens drawn."""
        if self.settings.direction == "hard":
            return _hard(student_DV, prepared.truth_S[prepared.distilled])
        if not len(student_DV):
            return student_DV.sum()
        assert prepared.goals_D is not None
        return prepared.goals_D.divergence(student_DV, self.settings.direction)


@dataclass(frozen=True, kw_only=True)
class CDLMBatch:
    """The forwards of a step and the goals of what they score.

    `truth_S`: what belongs at the first's S scored rows, and indices into these: `distilled` [D], whose teacher drew
    that from `goals_D`; `denoised` [N], where the reference has it; `later` [L], the rows that the second forward, of
    later states, scores too. With an `unmasking` the first forward is that of the states which it goes on to.
    """

    inputs: Inputs
    truth_S: Tensor
    unmasking: Unmasking | None
    distilled: Tensor
    goals_D: TopDistributions | HiddenDistributions | None
    denoised: Tensor
    later_inputs: Inputs | None
    later: Tensor


def _hard(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Cross-entropy; if there is no position, 0 with a gradient."""
    return losses.cross_entropy(logits_NV, targets_N, weights_N) if len(targets_N) else logits_NV.sum()


class _BlockStates:
    """Step ranks at packed positions, and which positions are masked in a state of the block.

    A state is named by a position of the block's order, counted from 0: it is the one in which that position was
    finalised. Positions of one pass share their state, so that a uniform draw weights states by the tokens that they
    decide.
    """

    def __init__(self, objective: CDLMObjective, documents: PackedDocuments, batch: Batch) -> None:
        self.reference_RT = batch.examples_N[documents.document_RT] >= objective.num_trajectories
        self._candidate_RT = documents.is_noisy_RT & ~self.reference_RT
        inside_RT = documents.inside_completion_RT & self._candidate_RT
        rank_RT = objective.rank_P[documents.source_RT]
        self.recorded_RT = inside_RT & (rank_RT > 0)
        # A given position is never masked; past the stored ones everything stays masked.
        self._rank_RT = torch.where(inside_RT, rank_RT, _NEVER)
        self._settled_RT = documents.settled_RT
        self._orders = objective.orders
        self.count_RT = torch.where(self._candidate_RT, self._orders.count_P[documents.source_RT], 0)
        completion_RT = objective.examples.completion_offsets[batch.examples_N[documents.document_RT]]
        self._block_source_RT = completion_RT + documents.packed.index_RT - documents.index_in_block_RT

    def _at(self, state_RT: Tensor) -> Tensor:
        return (self._block_source_RT + state_RT).clamp(0, len(self._orders.rank_P) - 1)

    def last_of_pass(self, state_RT: Tensor) -> Tensor:
        """The highest number that names the same state: positions of one pass share their state."""
        return torch.where(state_RT < self.count_RT, self._orders.after_P[self._at(state_RT)] - 1, state_RT)

    def masked_in(self, state_RT: Tensor) -> Tensor:
        """Positions that are masked in these states; in the state `count_RT` no recorded one is.

        A position that was never finalised holds the mask token either way.
        """
        pass_RT = torch.where(state_RT < self.count_RT, self._orders.rank_P[self._at(state_RT)], _NEVER)
        unmasked_RT = (self._rank_RT < pass_RT) | (self._settled_RT & (state_RT > 0))
        return self._candidate_RT & ~unmasked_RT


_NEVER = torch.iinfo(torch.long).max


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)))
