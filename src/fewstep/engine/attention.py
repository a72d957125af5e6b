"""Attention of a few rows against a long cache, for 16-bit numbers on a GPU.

Axes: R = requests, H = query heads, Q = rows of a forward, K = slots, E = head width.

A step of a few rows has too little work for attention's usual kernels, which give one program to a head: most of the
device waits. Here the keys are split among programs too, and their partial results are put together afterwards
(Flash-Decoding, Dao et al. 2023). Query heads that share a key head are rows of one program, so its keys are read once.
Slots that no row of a program sees are not read, so a cache may be much longer than what is in it, and one captured
pass serves every length.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

SPLIT_ATTENTION = "fewstep_split"
"""The name by which transformers knows it."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a cache, to which attention itself writes the rows of a forward before it reads.

    Passed to a layer in place of a `KVCache`, within `attending`. `keys` and `values` [slots, heads, K, E]: of all
    requests of the cache; `slots_RQ`: where each row's key and value go; `requests_r`: which of them the forward is of,
    None for all. Attention reads `length` slots.
    """

    keys: Tensor
    values: Tensor
    slots_RQ: Tensor
    requests_r: Tensor | None
    length: int

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return keys, values


_attended: list[LayerCache | None] = [None]


@contextmanager
def attending(cache: LayerCache | None) -> Iterator[None]:
    """Within this block attention is to this cache; None: to the keys and values that it is given."""
    _attended.append(cache)
    try:
        yield
    finally:
        _attended.pop()


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache = _attended[-1]
    if cache is None:
        return attend(query, key, value, attention_mask, scale), None
    rest = cache.keys, cache.values, cache.slots_RQ, cache.requests_r, cache.length
    # What comes after attention in most families; where it has another name, nothing is fetched.
    read_next = getattr(getattr(module, "o_proj", None), "weight", None)
    return attend_cached(query, key, value, attention_mask, scale, *rest, read_next), None


AttentionInterface.register(SPLIT_ATTENTION, _forward)


@torch.library.custom_op("fewstep::attend", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(q k * scale + mask) v, [R, Q, H, E].

    `queries` [R, H, Q, E]; `keys` and `values` [R, heads, K, E], of which H is a multiple; `mask` [R, 1, Q, K], numbers
    that are added. A row must see some slot. On a CPU, or in numbers of another size, torch's own attention.
    """
    if _has_kernel(queries):
        return _kernels().split_attention(queries, keys, values, mask, scale, None)
    grouped = queries.shape[1] != keys.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous()


# It writes to the cache, and does not say so: a compiler that knew would copy the cache, to keep what was there before
# for whoever reads it later. Nothing else in a layer's graph reads it.
@torch.library.custom_op("fewstep::attend_cached", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def attend_cached(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    mask: Tensor,
    scale: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    requests: Tensor | None,
    length: int,
    read_next: Tensor | None = None,
) -> Tensor:
    """As `attend`, to the first `length` slots of a cache into which the rows' own keys and values are written before.

    `new_keys` and `new_values` [R, heads, Q, E]; the others as in `LayerCache`. `read_next`: the weights of the product
    that comes next. Attention hardly reads the memory, so they are fetched meanwhile, into the cache of the GPU.
    """
    if _has_kernel(queries):
        _kernels().write_rows(new_keys, new_values, keys, values, slots, requests)
        seen = keys[:, :, :length], values[:, :, :length]
        return _kernels().split_attention(queries, *seen, mask, scale, requests, read_next)
    rows = torch.arange(len(slots), device=slots.device) if requests is None else requests
    for kept, new in ((keys, new_keys), (values, new_values)):
        kept.transpose(1, 2)[rows[:, None], slots] = new.transpose(1, 2)
    read = [kept[:, :, :length] if requests is None else kept[rows, :, :length] for kept in (keys, values)]
    return attend(queries, *read, mask, scale)


@attend.register_fake
def _(queries: Tensor, *rest: Any) -> Tensor:
    R, H, Q, E = queries.shape
    return queries.new_empty((R, Q, H, E))


@attend_cached.register_fake
def _(queries: Tensor, *rest: Any) -> Tensor:
    R, H, Q, E = queries.shape
    return queries.new_empty((R, Q, H, E))


def _has_kernel(queries: Tensor) -> bool:
    return queries.device.type == "cuda" and queries.dtype in (torch.bfloat16, torch.float16)


def _kernels() -> Any:
    from fewstep.engine import kernels  # builds of torch for a CPU come without Triton

    return kernels
