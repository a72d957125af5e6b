"""Attention masks from integer vectors of the positions, as dense tensors and for FlexAttention.

Axes: R = requests or packed rows, T = positions, Q = query rows, K = keys.

One predicate serves everything that runs uncached: padded batches, packed documents, and the packed CDLM forward
`[context | noisy response | clean response]` (arXiv 2503.09573 packs block diffusion alike), in which a noisy block
sees the clean rows of earlier blocks and itself, and clean rows see clean rows only. In the packed CLLM forward
`[prompt | noisy windows | clean answer]` a noisy window sees the clean rows before it, and itself causally.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

MAX_ROW_LENGTH = 1 << 14
"""Of packed rows: block numbers, which with a causal context count positions, stay below this."""

_HALF = MAX_ROW_LENGTH


@dataclass(frozen=True)
class Layout:
    """What decides visibility, for each position: integer tensors [R, T], `noisy_RT` boolean.

    `document` separates packed examples; padding has a document number of its own, so that it sees and is seen by
    padding only. `window_RT`, if given, is the first block of each noisy row's window; within a window rows are causal.
    Without it each noisy block is a window of its own.
    """

    document_RT: Tensor
    block_RT: Tensor
    noisy_RT: Tensor
    window_RT: Tensor | None = None

    @cached_property
    def _codes(self) -> tuple[Tensor, ...]:
        """Each row's code, the first and last code of the clean rows that it sees, and, with windows, the first code of
        the noisy ones: what `_sees` compares.

        Within its document's range of codes a clean row has its block's number, a noisy row the same in the upper
        half.
        """
        first_RT = (self.document_RT + 1) * (2 * _HALF)
        clean_RT = first_RT + self.block_RT.clamp_max(_HALF - 1)
        code_RT = torch.where(self.noisy_RT, clean_RT + _HALF, clean_RT)
        if self.window_RT is None:
            last_RT = torch.where(self.noisy_RT, clean_RT - 1, clean_RT)
            return code_RT.int(), first_RT.int(), last_RT.int()
        window_RT = first_RT + self.window_RT
        last_RT = torch.where(self.noisy_RT, window_RT - 1, clean_RT)
        start_RT = torch.where(self.noisy_RT, window_RT + _HALF, code_RT)
        return code_RT.int(), first_RT.int(), last_RT.int(), start_RT.int()

    def dense(self) -> Tensor:
        """Boolean [R, 1, Q, K]: the reference, and what SDPA takes on a CPU."""
        num_requests, length = self.block_RT.shape
        request = torch.arange(num_requests, device=self.block_RT.device)[:, None, None]
        position = torch.arange(length, device=self.block_RT.device)
        return _sees(self._codes, (request, position[None, :, None]), (request, position[None, None, :]))[:, None]

    def flex(self, create: Callable[..., BlockMask] = create_block_mask) -> BlockMask:
        """The same mask for FlexAttention, empty tiles left out."""
        num_requests, length = self.block_RT.shape
        codes = self._codes

        def predicate(request: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _sees(codes, (request, query), (request, key))

        return create(predicate, num_requests, None, length, length, device=self.block_RT.device)


def _sees(codes: tuple[Tensor, ...], query: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> Tensor:
    """Whether rows `query` = (request, position) see rows `key`; index tensors that broadcast.

    A clean row sees the clean rows of its document up to its own block. A noisy row sees the clean rows of blocks
    before its window, and the noisy rows of its window up to its own block. Attention kernels pay for every comparison:
    these are three, of one integer a key, and a fourth where windows have several blocks.
    """
    code_RT, first_RT, last_RT, *start_RT = codes
    code = code_RT[key]
    clean = (code >= first_RT[query]) & (code <= last_RT[query])
    if not start_RT:
        return clean | (code == code_RT[query])
    return clean | ((code >= start_RT[0][query]) & (code <= code_RT[query]))


def cached_mask(row_blocks_RQ: Tensor, slot_blocks_RK: Tensor) -> Tensor:
    """Boolean [R, 1, Q, K] of a forward against cache slots (or, uncached, against its own rows)."""
    return (slot_blocks_RK[:, None, :] <= row_blocks_RQ[:, :, None])[:, None]


def added_to_scores(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the numbers that attention adds to its scores: 0 where it is true, minus infinity elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def show_tree(mask_R1QK: Tensor, slots_RQ: Tensor, tree_TT: Tensor) -> None:
    """Let each of the last T rows see those of them that `tree_TT` ([T, T], or [R, T, T]) marks in the row's line, in
    place.

    Their slots are invisible so far. A request that is done has slots past the end; what its rows see does not matter.
    """
    num_rows = tree_TT.shape[-1]
    slots_RT = slots_RQ[:, -num_rows:].clamp(max=mask_R1QK.shape[-1] - 1)
    columns_RTT = slots_RT[:, None, :].expand(-1, num_rows, -1)
    mask_R1QK[:, 0, -num_rows:].scatter_(2, columns_RTT, tree_TT.expand_as(columns_RTT))
