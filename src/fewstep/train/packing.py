"""Packing documents of several segments into rows of one fixed length, without padding in between.

Axes: N = documents, G = segments of a document, R = rows, T = positions of a row, U = segments and gaps in a line.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def best_fit(lengths_N: np.ndarray, num_rows: int, row_length: int) -> np.ndarray:
    """Flat start positions of the leading documents in `num_rows` rows of `row_length`, each in the fullest with room.

    The result has one entry a placed document; placing ends at the first that fits no row. ValueError if a document
    exceeds a row.
    """
    starts: list[int] = []
    by_space = [(row_length, row) for row in range(num_rows)]  # ascending
    for length in lengths_N.tolist():
        if length > row_length:
            raise ValueError(f"a document of {length} tokens does not fit a row of {row_length}; use longer rows")
        fullest = bisect_left(by_space, (length, 0))
        if fullest == num_rows:
            break
        space, row = by_space.pop(fullest)
        starts.append((row + 1) * row_length - space)
        insort(by_space, (space - length, row))
    return np.asarray(starts, dtype=np.int64)


@dataclass(frozen=True)
class Packed:
    """For every packed position: its document, its segment, and its index within the segment; [R, T] each.

    Padding has document -1, segment 0 and index 0.
    """

    document_RT: Tensor
    segment_RT: Tensor
    index_RT: Tensor

    @property
    def real_RT(self) -> Tensor:
        return self.document_RT >= 0


def pack(starts_N: Tensor, segment_lengths_NG: Tensor, num_rows: int, row_length: int) -> Packed:
    """Lay documents out at the flat positions `starts_N` (ascending from 0); fixed shape, no host synchronisation."""
    device = starts_N.device
    total = num_rows * row_length
    num_segments = segment_lengths_NG.shape[1]
    # Each document's segments, and the gap up to the next document, one after the other.
    ends_N = starts_N + segment_lengths_NG.sum(1)
    gaps_N = torch.cat([starts_N[1:], starts_N.new_full((1,), total)]) - ends_N
    lengths_U = torch.cat([segment_lengths_NG, gaps_N[:, None]], 1).flatten()
    unit = torch.arange(len(lengths_U), device=device)
    segment_U = unit % (num_segments + 1)
    is_gap_U = segment_U == num_segments
    document_U = torch.where(is_gap_U, -1, unit.div(num_segments + 1, rounding_mode="floor"))
    first_U = lengths_U.cumsum(0) - lengths_U

    unit_T = torch.repeat_interleave(lengths_U, output_size=total)
    document_T = document_U[unit_T]
    index_T = torch.where(document_T < 0, 0, torch.arange(total, device=device) - first_U[unit_T])
    segment_T = segment_U.masked_fill(is_gap_U, 0)[unit_T]
    shape = (num_rows, row_length)
    return Packed(document_T.view(shape), segment_T.view(shape), index_T.view(shape))
