"""Which response positions a training forward hides.

Axes: N = documents, U = blocks of a document, T = flat positions.
"""

import torch
from torch import Tensor


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
    """Hide each position with the ratio of its unit (a document or a block)."""
    return torch.rand(unit_T.shape, generator=generator, device=unit_T.device) < ratio_U[unit_T]


def leftward_mask(block_T: Tensor, active_block_T: Tensor, hidden_T: Tensor) -> Tensor:
    """The states of block-by-block decoding: blocks before the active one are open, later ones hidden, `hidden_T`
    within it.
    """
    return (block_T > active_block_T) | ((block_T == active_block_T) & hidden_T)


def later_state(cut_T: Tensor, count_T: Tensor, sampler: str, draw_T: Tensor) -> Tensor:
    """A later state y* of the same block: states are named by how many of the block's `count_T` positions are
    finalised.

    `next`: one position later; `uniform`: any later state with something still hidden, by the uniform draw `draw_T`;
    `last`: the last of those. Where no later state hides anything the result is `count_T`. ValueError for another
    sampler.
    """
    last_T = count_T - 1
    match sampler:
        case "next":
            later_T = cut_T + 1
        case "uniform":
            span_T = (last_T - cut_T).clamp_min(1)
            later_T = cut_T + 1 + (draw_T * span_T).long()
        case "last":
            later_T = last_T
        case _:
            raise ValueError(f"unknown y* sampler {sampler!r}; choose next, uniform or last")
    return torch.where(later_T > cut_T, later_T, count_T).minimum(count_T)
