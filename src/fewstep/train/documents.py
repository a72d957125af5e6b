"""Documents of a batch as packed rows: where their tokens lie, what is masked of them, which rows score them.

Axes: N = documents of a batch, G = segments, C = canvases, U = states (of blocks or canvases), B = positions of a
block, R = packed rows, T = positions, S = scored positions, V = vocabulary.

A diffusion document is `[context | noisy response]`, perhaps with further noisy responses, and for the block-causal
role `[context | noisy response | clean response]`, so that one forward trains all blocks (see `models.masks.Layout`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.models.masks import Layout
from fewstep.models.noise_conditioning import NoisyRows
from fewstep.models.roles import Role
from fewstep.train import corruption
from fewstep.train.corruption import BlockCorruption
from fewstep.train.examples import Examples
from fewstep.train.packing import Packed
from fewstep.values import Count, Weight, check_fields

CONTEXT, NOISY, CLEAN = 0, 1, 2


@dataclass(frozen=True)
class Batch:
    """Documents of one forward: which examples, their segment lengths, where they lie; the number of the batch in its
    run.
    """

    examples_N: Tensor
    segments_NG: Tensor
    packed: Packed
    number: int = 0


class Inputs(NamedTuple):
    """What a forward takes: tokens and positions [R, T], their layout, and the flat rows [S] to score.

    `adapted_RT`, boolean: the rows to which a gated adapter applies; None for a network without one.
    """

    tokens_RT: Tensor
    positions_RT: Tensor
    layout: Layout
    rows_S: Tensor
    adapted_RT: Tensor | None = None


WeightsOf = Literal["own", "average", "start"]
"""Of a forward without gradient: the weights in training, their moving average, or those of the beginning."""


class Forward(Protocol):
    """The network as objectives see it: logits [S, V] of flat scored rows, with or without gradient.

    `noisy`: rows of canvases in embedding space; then a network that predicts embeddings gives these, [S, D].
    """

    def __call__(
        self,
        tokens_RT: Tensor,
        positions_RT: Tensor,
        layout: Layout,
        rows_S: Tensor,
        adapted_RT: Tensor | None = None,
        *,
        gradient: bool = True,
        noisy: NoisyRows | None = None,
        weights: WeightsOf = "own",
    ) -> Tensor: ...


@dataclass(frozen=True)
class Unmasking:
    """Which of the scored positions [S] the network unmasks by itself before it learns.

    `targets_S` are their flat places. `unit_S` says in which of U states each is, U for those that stay as they are,
    and `index_S` tells those of a state apart: below `block_size`. `count_U`: how many of a state are unmasked; those
    of `settled_S` come first, as in decoding.
    """

    targets_S: Tensor
    unit_S: Tensor
    index_S: Tensor
    count_U: Tensor
    settled_S: Tensor
    block_size: int

    def go_on(self, forward: Forward, inputs: Inputs, truth_S: Tensor) -> tuple[Inputs, Tensor]:
        """The inputs of the states that the network goes on to, and which of the scored positions [S] they leave to
        learn, as 0 and 1.
        """
        unmasked_S = self._chosen(forward(*inputs, gradient=False))
        tokens = inputs.tokens_RT.flatten()
        tokens = tokens.scatter(0, self.targets_S, torch.where(unmasked_S, truth_S, tokens[self.targets_S]))
        left_S = (~unmasked_S | self.settled_S).float()
        return inputs._replace(tokens_RT=tokens.view_as(inputs.tokens_RT)), left_S

    def _chosen(self, logits_SV: Tensor) -> Tensor:
        """Boolean [S]: of each state as many as it unmasks, the most confident ones."""
        confidence_S = logits_SV.float().log_softmax(-1).amax(-1).masked_fill(self.settled_S, 1.0)
        grid_UB = confidence_S.new_full((len(self.count_U) + 1, self.block_size), float("-inf"))
        grid_UB[self.unit_S, self.index_S] = confidence_S
        rank_UB = grid_UB.argsort(1, descending=True).argsort(1)
        count_U = torch.cat([self.count_U, self.count_U.new_zeros(1)])
        return rank_UB[self.unit_S, self.index_S] < count_U[self.unit_S]


@dataclass(frozen=True, kw_only=True)
class CanvasLengths:
    """Canvas lengths drawn independently of the answer's: a multiple of `block_size`, redrawn (rounded up) if too
    short.

    `weights[i]` is the relative frequency of `i + 1` blocks.
    """

    block_size: Count = 32
    weights: tuple[Weight, ...] = (0.0, 0.1, 0.2, 0.25, 0.15, 0.1, 0.05, 0.15)

    def __post_init__(self) -> None:
        check_fields(self, "the canvas")
        if not sum(self.weights) > 0:
            raise FewstepError(f"canvas weights are frequencies, not all of them 0, got {self.weights}")

    @property
    def longest(self) -> int:
        """Tokens of the longest canvas that there is."""
        return len(self.weights) * self.block_size

    def draw(
        self, needed_N: np.ndarray, rng: np.random.Generator | None, name: Callable[[int], str] = "answer {}".format
    ) -> np.ndarray:
        """Canvas lengths of at least `needed_N` tokens, drawn from the distribution conditioned on being long enough;
        without `rng` the greatest possible lengths. FewstepError with the `name` of the first answer that is too long.
        """
        too_long = (needed_N > self.longest).nonzero()[0]
        if len(too_long):
            raise FewstepError(
                f"{name(int(too_long[0]))}: an answer of {needed_N[too_long[0]]} tokens exceeds the longest canvas of "
                f"{self.longest}; leave it out or allow more blocks (canvas_weights)"
            )
        chance = np.asarray(self.weights) / np.sum(self.weights)
        needed_blocks = np.maximum(-(-needed_N // self.block_size), 1)
        if rng is None:
            return np.maximum(needed_blocks, np.flatnonzero(chance)[-1] + 1) * self.block_size
        cumulative = np.concatenate([[0.0], chance.cumsum()])
        below = cumulative[needed_blocks - 1]
        quantile = below + rng.random(len(needed_N)) * (1 - below)
        blocks = np.searchsorted(cumulative, quantile, side="right")
        return np.clip(blocks, needed_blocks, len(chance)) * self.block_size


class Masking(NamedTuple):
    """Masked positions, those of them that are scored, and the mask ratio at each position, [R, T] each.

    `unit_RT`: in which of `num_units` states each position is, and `goes_on_RT`: where the state is one of decoding,
    from which a network can go on by itself.
    """

    masked_RT: Tensor
    scored_RT: Tensor
    ratio_RT: Tensor
    unit_RT: Tensor
    num_units: int
    goes_on_RT: Tensor


class PackedDocuments:
    """Index arithmetic shared by the objectives: contexts and responses of a batch as packed rows."""

    def __init__(
        self,
        role: Role,
        examples: Examples,
        batch: Batch,
        eos_token_id: int,
        *,
        canvases: int = 1,
        apart: bool = False,
    ) -> None:
        """`apart`: the context sees no canvas, even if there is one only, as in the role `embedding`."""
        self.role = role
        self.canvases = canvases
        self.apart = apart or canvases > 1
        packed = batch.packed
        document = packed.document_RT.clamp_min(0)
        example = batch.examples_N[document]
        self.packed = packed
        self.document_RT = document
        self.context_RT = batch.segments_NG[document, 0]
        in_context = packed.segment_RT == CONTEXT
        self.positions_RT = torch.where(in_context, packed.index_RT, self.context_RT + packed.index_RT)
        self.is_noisy_RT = packed.real_RT & (packed.segment_RT >= NOISY) & (packed.segment_RT < NOISY + canvases)
        self.completion_lengths_RT = examples.completion_offsets[example + 1] - examples.completion_offsets[example]
        self.inside_completion_RT = ~in_context & (packed.index_RT < self.completion_lengths_RT)
        # Where a response position lies in the flat completions (its last token for positions past the end).
        self.source_RT = examples.completion_offsets[example] + packed.index_RT.minimum(self.completion_lengths_RT - 1)
        response = torch.where(self.inside_completion_RT, examples.completion_ids[self.source_RT], eos_token_id)
        prompt_last = len(examples.prompt_ids) - 1
        prompt = examples.prompt_ids[(examples.prompt_offsets[example] + packed.index_RT).clamp_max(prompt_last)]
        self.clean_RT = torch.where(in_context, prompt, response).long()

    def layout(self) -> Layout:
        """Visibility by the role's block numbers. The blocks of a block-causal network, and several canvases of one
        context, have noisy rows of their own, which only rows of the same number see.
        """
        blocks = self.role.blocks(self.positions_RT, self.context_RT)
        if self.role.name == "block_causal":
            return Layout(self.packed.document_RT, blocks, self.is_noisy_RT)
        if not self.apart:
            return Layout(self.packed.document_RT, blocks, torch.zeros_like(self.is_noisy_RT))
        blocks = blocks + torch.where(self.is_noisy_RT, self.packed.segment_RT - NOISY, 0)
        return Layout(self.packed.document_RT, blocks, self.is_noisy_RT)

    def block_of_response(self) -> Tensor:
        """Number of the block, from 0, in which a response position lies."""
        return self.packed.index_RT.div(self.role.block_size, rounding_mode="floor")

    @property
    def index_in_block_RT(self) -> Tensor:
        """Which position of its block a response position is, from 0."""
        return self.packed.index_RT % self.role.block_size

    def block_units(self, num_documents: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A number for every (document, block) at each position, and a uniform draw for each number."""
        blocks_per_document = self.packed.index_RT.shape[1] // self.role.block_size + 1
        unit_RT = self.document_RT * blocks_per_document + self.block_of_response()
        return unit_RT, corruption.stratified_uniform((num_documents * blocks_per_document,), generator)

    @property
    def settled_RT(self) -> Tensor:
        """Noisy positions whose row, one earlier, does not see their block: decoding's first step finalises them.

        So in a state that has anything unmasked in a block these are unmasked, and since their row is a clean one, they
        can be scored in every state.
        """
        shifted = self.role.right_shift_logits and self.role.name == "block_causal"
        return self.is_noisy_RT & (self.index_in_block_RT == 0) & shifted

    def masked_within_blocks(
        self, corrupt: BlockCorruption, unit_RT: Tensor, ratio_U: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Which positions of a block the state of each unit (a block, or a canvas for its active one) masks, [R, T]."""
        block_size, index_RT = self.role.block_size, self.index_in_block_RT
        return corrupt.within_blocks(index_RT, self.clean_RT, unit_RT, ratio_U, block_size, generator)

    def mask_blocks(self, num_documents: int, corrupt: BlockCorruption, generator: torch.Generator) -> Masking:
        """A state of every block of its own: what is masked, what of it is scored, and which of them go on."""
        unit_RT, ratio_U = self.block_units(num_documents, generator)
        _, whole_U = self.block_units(num_documents, generator)
        whole_RT = (whole_U < corrupt.untouched)[unit_RT]
        within_RT = self.masked_within_blocks(corrupt, unit_RT, ratio_U, generator)
        masked_RT = whole_RT | (within_RT & ~self.settled_RT)
        masked_RT = masked_RT & self.is_noisy_RT
        ratio_RT = torch.where(whole_RT, 1.0, ratio_U[unit_RT])
        return Masking(masked_RT, masked_RT | self.settled_RT, ratio_RT, unit_RT, len(ratio_U), self.is_noisy_RT)

    def unmasking(self, masking: Masking, targets: Tensor, visited: float, generator: torch.Generator) -> Unmasking:
        """A random number of the masked positions, but not all, in a share `visited` of the states that can go on."""
        goes_on_U, share_U = (corruption.stratified_uniform((masking.num_units,), generator) for _ in range(2))
        unit_S = masking.unit_RT.flatten()[targets]
        free_S = masking.goes_on_RT.flatten()[targets] & masking.masked_RT.flatten()[targets]
        unit_S = torch.where(free_S & (goes_on_U < visited)[unit_S], unit_S, masking.num_units)
        masked_U = torch.bincount(unit_S, minlength=masking.num_units + 1)[:-1]
        return Unmasking(
            targets_S=targets,
            unit_S=unit_S,
            index_S=self.index_in_block_RT.flatten()[targets],
            count_U=(share_U * masked_U).long().minimum((masked_U - 1).clamp_min(0)),
            settled_S=self.settled_RT.flatten()[targets],
            block_size=self.role.block_size,
        )

    def with_masks(self, masked_RT: Tensor) -> Tensor:
        """Token ids with the mask token at masked positions."""
        assert self.role.mask_token_id is not None
        return torch.where(masked_RT, self.role.mask_token_id, self.clean_RT)

    def rows(self, chosen_RT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flat targets and the flat rows that score them.

        With shifted logits the row is one earlier. A block's first token is then scored by the last row before the
        block, which is a clean one, and every canvas's first token by the last row of the context.
        """
        targets = chosen_RT.flatten().nonzero()[:, 0]
        if not self.role.right_shift_logits:
            return targets, targets
        index = self.packed.index_RT.flatten()[targets]
        canvas = batch.segments_NG[self.document_RT.flatten()[targets], NOISY]
        if self.role.name != "block_causal":
            before = (self.packed.segment_RT.flatten()[targets] - NOISY) * canvas
            return targets, targets - 1 - torch.where(index == 0, before, 0)
        at_border = (index % self.role.block_size == 0) & (index > 0)
        return targets, torch.where(at_border, targets + canvas - 1, targets - 1)


def check_packable(role: Role) -> None:
    """FewstepError for a kind of attention that the packed forward does not train."""
    if role.name == "block_causal" and role.context_attention == "block_causal":
        raise FewstepError(
            "training with context_attention=block_causal is not supported, since its first block holds a part of the "
            "context; use bidirectional or causal"
        )
