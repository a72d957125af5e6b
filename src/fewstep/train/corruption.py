"""Which response positions a training forward masks.

Axes: N = documents, U = units with a state of their own (documents, canvases or blocks), T = positions, of any shape.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.models.roles import RoleName
from fewstep.values import MOST_INTEGER, Share, check_fields


@dataclass(frozen=True, kw_only=True)
class BlockCorruption:
    """Which positions the states of a block mask.

    A share `untouched` is fully masked, the state that decoding meets in every block of a block-causal network. A share
    `frontier` of the others is masked from a random point on, a share `late` has the `late_tokens` after such a point
    masked and few others (decoding by confidence leaves what has to be computed, such as digits, for last), and the
    rest has positions masked at random.

    In a share `visited` of the states, the network in training first decodes further by itself: a forward without
    gradient ranks the masked positions of the block by confidence, and a random number of the most confident ones are
    unmasked, to the reference's tokens, before the state is learned from. So training meets the states that decoding by
    confidence visits (as PUMA does, arXiv 2602.10314, by streams of batches).
    """

    frontier: Annotated[Share, "Share of the states that are unmasked up to a random point."] = 0.0
    late: Annotated[Share, "Share of the states whose late tokens stay masked longest."] = 0.0
    late_tokens: Annotated[
        tuple[Annotated[int, Ge(0), Le(MOST_INTEGER)], ...], "Ids of the late tokens, such as those of the digits."
    ] = ()
    visited: Annotated[Share, "Share of the states in which the network first unmasks what it is surest of."] = 0.0
    untouched: Annotated[Share, "Share of a block_causal network's blocks that are fully masked."] = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        if self.frontier + self.late > 1:
            raise FewstepError(f"frontier and late are shares of the same states, got {self.frontier} + {self.late}")
        if bool(self.late) != bool(self.late_tokens):
            raise FewstepError("late is the share of states whose late_tokens stay masked longest; set both or none")

    def check_tokens(self, vocab_size: int) -> None:
        """FewstepError for late tokens that a vocabulary of this size does not have."""
        for token in self.late_tokens:
            if not 0 <= token < vocab_size:
                raise FewstepError(f"late_tokens: the vocabulary of {vocab_size} tokens has no id {token}")

    def within_blocks(
        self,
        index_T: Tensor,
        tokens_T: Tensor,
        unit_T: Tensor,
        ratio_U: Tensor,
        block_size: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Which positions each unit's state masks: at random with the unit's ratio, or as `frontier` and `late` say.

        `index_T`: the index of a position in its block; `tokens_T`: what belongs there.
        """
        masked_T = random_mask(unit_T, ratio_U, generator)
        if not self.frontier and not self.late:
            return masked_T
        kind_T = stratified_uniform(tuple(ratio_U.shape), generator)[unit_T]
        after_T = index_T >= ((1 - ratio_U) * block_size).long()[unit_T]
        if self.late:
            few_T = random_mask(unit_T, ratio_U**3, generator)
            late_T = torch.isin(tokens_T, torch.tensor(self.late_tokens))
            is_late_T = kind_T < self.frontier + self.late
            masked_T = torch.where(is_late_T, torch.where(late_T, after_T, few_T), masked_T)
        return torch.where(kind_T < self.frontier, after_T, masked_T)


@dataclass(frozen=True, kw_only=True)
class Corruption(BlockCorruption):
    """How responses are masked.

    A block-causal network is shown a state of every block. For a bidirectional teacher `leftward` is the share of
    documents shown as in block-by-block decoding: earlier blocks unmasked, later ones masked, loss on the active one,
    whose state is one of `BlockCorruption`'s (never `untouched`). In all other documents each position is masked with
    one random ratio (LLaDA, arXiv 2502.09992).

    `weighting`: `uniform` averages over masked positions; `inverse_ratio` is the likelihood bound's 1/t.
    """

    leftward: Annotated[
        Share, "Share of a bidirectional teacher's documents that are shown as in block-by-block decoding."
    ] = 0.0
    weighting: Annotated[
        Literal["uniform", "inverse_ratio"],
        "Average over masked positions, or weigh them by 1/t as the likelihood bound does.",
    ] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.visited or self.late) and self.weighting == "inverse_ratio":
            raise FewstepError("visited and late states have no mask ratio to weight by; use the weighting uniform")

    def check(self, role: RoleName) -> None:
        """FewstepError if a share has no meaning for the role."""
        if role == "block_causal" and self.leftward:
            raise FewstepError("leftward states are for the role bidirectional; a block_causal network sees no others")
        if role == "bidirectional" and (self.frontier or self.late or self.visited) and not self.leftward:
            raise FewstepError("frontier, late and visited are shares of the leftward documents; set leftward too")


def stratified_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform draws in [0, 1) that cover the interval evenly (one in each of as many equal parts), in random order.

    The low-variance sampler of mask ratios of variational diffusion models (arXiv 2107.00630), shuffled.
    """
    count = max(1, int(torch.Size(shape).numel()))
    device = generator.device
    strata = torch.randperm(count, generator=generator, device=device)
    return ((strata + torch.rand(count, generator=generator, device=device)) / count)[: torch.Size(shape).numel()].view(
        shape
    )


def random_mask(unit_T: Tensor, ratio_U: Tensor, generator: torch.Generator) -> Tensor:
    """Mask each position with the ratio of its unit (a document or a block)."""
    return torch.rand(unit_T.shape, generator=generator, device=unit_T.device) < ratio_U[unit_T]


def leftward_mask(block_T: Tensor, active_block_T: Tensor, masked_T: Tensor) -> Tensor:
    """The states of block-by-block decoding: blocks before the active one are unmasked, later ones masked, and
    `masked_T` says what is masked within it.
    """
    return (block_T > active_block_T) | ((block_T == active_block_T) & masked_T)


def later_state(cut_T: Tensor, count_T: Tensor, sampler: str, draw_T: Tensor) -> Tensor:
    """A later state y* of the same block: states are named by how many of the block's `count_T` positions are
    finalised.

    `next`: one position later; `uniform`: any later state with something still masked, by the uniform draw `draw_T`;
    `last`: the last of those. Where no later state masks anything the result is `count_T`. ValueError for another
    sampler.
    """
    last_T = count_T - 1
    match sampler:
        case "next":
            later_T = cut_T + 1
        case "uniform":
            num_later_T = (last_T - cut_T).clamp_min(1)
            later_T = cut_T + 1 + (draw_T * num_later_T).long()
        case "last":
            later_T = last_T
        case _:
            raise ValueError(f"unknown y* sampler {sampler!r}; choose next, uniform or last")
    return torch.where(later_T > cut_T, later_T, count_T).minimum(count_T)
