"""Triton kernels of attention: a few rows against a long cache, whose slots are split among programs.

Imported on a GPU only: builds of torch for a CPU come without Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 64
"""Slots that a program looks at at once."""

_MOST_ROWS = 64
"""Rows of a program: heads of a group times rows of the forward, of which there may be more programs."""

_WARPS = 4
_LINE = 128
"""Bytes that are fetched at once."""


def write_rows(
    new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor, requests: Tensor | None
) -> None:
    R, heads, Q, E = new_keys.shape
    _write_row[(R * Q, heads)](
        new_keys, new_values, keys, values, slots, slots if requests is None else requests,
        *new_keys.stride(), *new_values.stride(), *keys.stride(), *values.stride(), *slots.stride(),
        Q, E, IS_PART=requests is not None, BLOCK_WIDTH=triton.next_power_of_2(E), num_warps=1,
    )  # fmt: skip


def split_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    requests: Tensor | None,
    read_next: Tensor | None = None,
) -> Tensor:
    """As `attention.attend`. `read_next`: weights to fetch meanwhile, since attention leaves the memory idle."""
    R, H, Q, E = queries.shape
    num_heads, K = keys.shape[1], keys.shape[2]
    group = H // num_heads
    block_rows = min(_MOST_ROWS, max(16, triton.next_power_of_2(group * Q)))
    tiles = triton.cdiv(group * Q, block_rows)
    processors = torch.cuda.get_device_properties(queries.device).multi_processor_count
    wanted = max(1, processors // (R * num_heads * tiles))  # one wave of programs: each part has to be put together
    per_split = triton.cdiv(triton.cdiv(K, min(wanted, triton.cdiv(K, _KEYS))), _KEYS) * _KEYS
    splits = triton.cdiv(K, per_split)
    out = queries.new_empty((R, Q, H, E))
    block_width = triton.next_power_of_2(E)
    partial = queries.new_empty((splits, R, H, Q, E), dtype=torch.float32) if splits > 1 else out
    weights = queries.new_empty((2, splits, R, H, Q), dtype=torch.float32)
    num_lines = 0 if read_next is None else read_next.numel() * read_next.element_size() // _LINE
    _attend_split[(R * num_heads, tiles, splits)](
        queries, keys, values, mask, mask if requests is None else requests, partial, weights, out, scale,
        *queries.stride(), *keys.stride(), *values.stride(), mask.stride(0), mask.stride(2), mask.stride(3),
        R, H, Q, K, E, mask if read_next is None else read_next, num_lines,
        GROUP=group, PER_SPLIT=per_split, BLOCK_ROWS=block_rows, BLOCK_KEYS=_KEYS, BLOCK_WIDTH=block_width,
        SPLITS=splits, IS_PART=requests is not None, LINES=32 * _WARPS, LINE=_LINE, FETCHES=num_lines > 0,
        num_warps=_WARPS, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _put_together[(R * H, Q)](
            partial, weights, out, R, H, Q, E,
            SPLITS=splits, BLOCK_SPLITS=triton.next_power_of_2(splits), BLOCK_WIDTH=block_width, num_warps=1,
        )  # fmt: skip
    return out


@triton.jit
def _write_row(
    new_keys, new_values, keys, values, slots, requests,
    nk_request, nk_head, nk_row, nk_place, nv_request, nv_head, nv_row, nv_place,
    k_request, k_head, k_slot, k_place, v_request, v_head, v_slot, v_place, s_request, s_row,
    Q, E, IS_PART: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Key and value of one row and head, into its slot."""
    request, row, head = tl.program_id(0) // Q, tl.program_id(0) % Q, tl.program_id(1)
    place = tl.arange(0, BLOCK_WIDTH)
    slot = tl.load(slots + request * s_request + row * s_row)
    kept = tl.load(requests + request) if IS_PART else request.to(tl.int64)
    inside = place < E
    k = tl.load(new_keys + request * nk_request + head * nk_head + row * nk_row + place * nk_place, mask=inside)
    v = tl.load(new_values + request * nv_request + head * nv_head + row * nv_row + place * nv_place, mask=inside)
    tl.store(keys + kept * k_request + head * k_head + slot * k_slot + place * k_place, k, mask=inside)
    tl.store(values + kept * v_request + head * v_head + slot * v_slot + place * v_place, v, mask=inside)


@triton.jit
def _attend_split(
    queries, keys, values, mask, requests, partial, weights, out, scale,
    q_request, q_head, q_row, q_place, k_request, k_head, k_slot, k_place, v_request, v_head, v_slot, v_place,
    m_request, m_row, m_slot,
    R, H, Q, K, E, read_next, num_lines,
    GROUP: tl.constexpr, PER_SPLIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, SPLITS: tl.constexpr, IS_PART: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr,
    FETCHES: tl.constexpr,
):  # fmt: skip
    """One tile of a key head's rows against one part of its slots; with one part the result, else its numerator,
    largest score and denominator.
    """
    request = (tl.program_id(0) // (H // GROUP)).to(tl.int64)
    key_head = tl.program_id(0) % (H // GROUP)
    kept = tl.load(requests + request) if IS_PART else request
    split = tl.program_id(2)
    index = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = index < GROUP * Q
    head = key_head * GROUP + index // Q
    row = index % Q
    place = tl.arange(0, BLOCK_WIDTH)
    q_at = request * q_request + head[:, None] * q_head + row[:, None] * q_row + place[None] * q_place
    q = tl.load(queries + q_at, mask=is_row[:, None] & (place < E)[None], other=0.0)
    best = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    found = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    slot = split * PER_SPLIT + tl.arange(0, BLOCK_KEYS)
    m_at = mask + request * m_request + row[:, None] * m_row + slot[None] * m_slot
    added = tl.load(m_at, mask=is_row[:, None] & (slot < K)[None], other=float("-inf")).to(tl.float32)
    if FETCHES:
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * SPLITS + split
        num_programs = tl.num_programs(0) * tl.num_programs(1) * SPLITS
        for first in range(program * LINES, num_lines, num_programs * LINES):
            line = tl.minimum(first + tl.arange(0, LINES), num_lines - 1)
            at = read_next.to(tl.int64) + line.to(tl.int64) * LINE
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
            )
    for start in range(split * PER_SPLIT, tl.minimum(split * PER_SPLIT + PER_SPLIT, K), BLOCK_KEYS):
        slot = start + tl.arange(0, BLOCK_KEYS)
        # Whether the next slots are seen is asked before these are read, since each answer takes a while to come.
        later = slot + BLOCK_KEYS
        m_at += BLOCK_KEYS * m_slot
        is_later = is_row[:, None] & (later < tl.minimum(split * PER_SPLIT + PER_SPLIT, K))[None]
        next_added = tl.load(m_at, mask=is_later, other=float("-inf")).to(tl.float32)
        if tl.max(tl.max(added, 1), 0) > float("-inf"):
            inside = (slot < K)[:, None] & (place < E)[None]
            k_at = kept * k_request + key_head * k_head + slot[:, None] * k_slot + place[None] * k_place
            k = tl.load(keys + k_at, mask=inside, other=0.0)
            v_at = kept * v_request + key_head * v_head + slot[:, None] * v_slot + place[None] * v_place
            v = tl.load(values + v_at, mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k)) * scale + added
            higher = tl.maximum(best, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shares = tl.exp(scores - base[:, None])
            rescaled = tl.exp(best - base)
            found = found * rescaled[:, None] + tl.dot(shares.to(v.dtype), v)
            total = total * rescaled + tl.sum(shares, 1)
            best = higher
        added = next_added
    written = is_row[:, None] & (place < E)[None]
    if SPLITS == 1:
        o_at = ((request * Q + row[:, None]) * H + head[:, None]) * E + place[None]
        tl.store(out + o_at, (found / total[:, None]).to(out.dtype.element_ty), mask=written)
    else:
        line = ((split * R + request) * H + head) * Q + row
        tl.store(partial + line[:, None] * E + place[None], found, mask=written)
        tl.store(weights + line, best, mask=is_row)
        tl.store(weights + SPLITS * R * H * Q + line, total, mask=is_row)


@triton.jit
def _put_together(
    partial, weights, out, R, H, Q, E,
    SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of one head from its parts."""
    request, head, row = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    split, place = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_WIDTH)
    line = ((split * R + request) * H + head) * Q + row
    is_split = split < SPLITS
    best = tl.load(weights + line, mask=is_split, other=float("-inf"))
    total = tl.load(weights + SPLITS * R * H * Q + line, mask=is_split, other=0.0)
    share = tl.exp(best - tl.max(best, 0))
    inside = is_split[:, None] & (place < E)[None]
    found = tl.load(partial + line[:, None].to(tl.int64) * E + place[None], mask=inside, other=0.0)
    row_E = tl.sum(found * share[:, None], 0) / tl.sum(total * share, 0)
    o_at = ((request * Q + row) * H + head) * E + place
    tl.store(out + o_at, row_E.to(out.dtype.element_ty), mask=place < E)
