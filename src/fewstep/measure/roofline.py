"""What a forward must at least read and compute, and what follows from that for decoding with more and more requests.

The *floor* of a forward is the time below which no program gets it on a device of a given bandwidth and matrix rate:
the time to read its bytes once, or the time of its arithmetic if that is longer. Bytes are those of the weights
(without the embedding table, of which a forward reads a few rows, and with the head) and of the cached keys and values
that its rows attend to. The arithmetic intensity is operations per byte read; where it is below `Rates.ridge`, the
device waits for its memory (Williams et al. 2009, the roofline model).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from fewstep.models.cache import bytes_per_position


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device can do: bytes a second that it reads, operations a second of large matrix products."""

    bytes_per_second: float
    flops_per_second: float

    @property
    def ridge(self) -> float:
        """Operations per byte from which the arithmetic takes longer than the reading."""
        return self.flops_per_second / self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Work:
    """Bytes that are read once, and operations (a multiplication with its addition counts as two)."""

    bytes_read: float
    flops: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes_read

    def floor_seconds(self, rates: Rates) -> float:
        return max(self.bytes_read / rates.bytes_per_second, self.flops / rates.flops_per_second)

    def is_memory_bound(self, rates: Rates) -> bool:
        return self.intensity < rates.ridge


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a network: what its forwards read and compute.

    `weight_bytes`: read once a forward. `row_flops`: of a row in the layers' products. `head_flops`: of a row that is
    scored. `kv_bytes`: keys and values of one position in all layers. `pair_flops`: of a row with one position that it
    attends to, in all layers.
    """

    weight_bytes: int
    row_flops: int
    head_flops: int
    kv_bytes: int
    pair_flops: int

    @classmethod
    def of(cls, module: PreTrainedModel, dtype: torch.dtype | None = None) -> "Sizes":
        """Of a network whose weights are computed with in these numbers, by default its own."""
        config, dtype = module.config, dtype or module.dtype
        embedding, head = module.get_input_embeddings().weight, module.get_output_embeddings().weight
        parameters = {id(each): each for each in module.parameters()}  # a tied head is the embedding table
        if head is not embedding:
            parameters.pop(id(embedding), None)
        matrices = sum(each.numel() for each in parameters.values() if each.dim() > 1) - head.numel()
        num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        return cls(
            weight_bytes=sum(_stored_bytes(each, dtype) for each in parameters.values()),
            row_flops=2 * matrices,
            head_flops=2 * head.numel(),
            kv_bytes=bytes_per_position(config, dtype),
            pair_flops=4 * num_layers * num_heads * head_width,
        )

    def forward(self, *, rows: float, scored: float, keys: float, pairs: float) -> Work:
        """The work of one forward over all requests of a batch.

        `rows` are computed and `scored` of them go through the head; `keys` positions are read from the cache (0
        without one), and `pairs` is the sum over the rows of the positions that each attends to.
        """
        return Work(
            bytes_read=self.weight_bytes + self.kv_bytes * keys,
            flops=self.row_flops * rows + self.head_flops * scored + self.pair_flops * pairs,
        )


def _stored_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """In these numbers; of a quantised tensor those of the tensors that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return sum(part.numel() * part.element_size() for part in parts)
    return tensor.numel() * min(tensor.element_size(), dtype.itemsize)


# Kinds of decoding, by arithmetic alone

Kind = Literal["causal", "block", "full canvas"]
"""One token a pass with a KV cache; a block of masks with a KV cache; context and canvas as a whole, without one."""

KINDS: tuple[Kind, ...] = ("causal", "block", "full canvas")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is decoded: prompts of `context` tokens and `canvas` new ones, in blocks of `block_size`.

    `tokens_per_pass`: those that a pass finalises of each request, where it may finalise several.
    """

    context: int
    canvas: int
    block_size: int
    tokens_per_pass: float

    def tokens(self, kind: Kind) -> float:
        """Finalised of each request in a pass."""
        return 1 if kind == "causal" else self.tokens_per_pass


def pass_work(kind: Kind, sizes: Sizes, setting: Setting, num_requests: int) -> Work:
    """The work of an average pass: half of the canvas is behind it.

    Block by block, the first pass of a block also carries the finished block before it.
    """
    behind = setting.context + setting.canvas / 2
    if kind == "causal":
        rows, scored, keys = 1.0, 1, behind
    elif kind == "block":
        passes = math.ceil(setting.block_size / setting.tokens_per_pass)
        rows, scored, keys = setting.block_size * (1 + 1 / passes), setting.block_size, behind
    else:
        rows, scored, keys = setting.context + setting.canvas, setting.block_size, 0
    attended = keys or rows
    return sizes.forward(
        rows=num_requests * rows,
        scored=num_requests * scored,
        keys=num_requests * keys,
        pairs=num_requests * rows * attended,
    )


def tokens_per_second(kind: Kind, sizes: Sizes, setting: Setting, num_requests: int, rates: Rates) -> float:
    """At most, of all requests together, prefill apart."""
    seconds = pass_work(kind, sizes, setting, num_requests).floor_seconds(rates)
    return num_requests * setting.tokens(kind) / seconds


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What a kind of decoding is bound by, over batch sizes.

    `intensity`: operations per byte of a single request's pass. `memory_bound_up_to`: the largest batch whose passes
    wait for the memory. `pays_up_to`: the largest at which it may give more tokens a second than causal decoding. None:
    not even a single request; MOST_REQUESTS: as many as were looked at.
    """

    kind: Kind
    intensity: float
    memory_bound_up_to: int | None
    pays_up_to: int | None


def analysed(sizes: Sizes, setting: Setting, rates: Rates) -> list[Analysis]:
    """Every kind of decoding."""
    return [
        Analysis(
            kind=kind,
            intensity=pass_work(kind, sizes, setting, 1).intensity,
            memory_bound_up_to=memory_bound_up_to(kind, sizes, setting, rates),
            pays_up_to=None if kind == "causal" else pays_up_to(kind, sizes, setting, rates),
        )
        for kind in KINDS
    ]


def last_batch(batch_sizes: Iterable[int], holds: Sequence[bool]) -> int | None:
    """The largest batch up to which it holds for all; None if not even for the first."""
    last = None
    for batch_size, held in zip(batch_sizes, holds, strict=True):
        if not held:
            break
        last = batch_size
    return last


MOST_REQUESTS = 4096


def memory_bound_up_to(kind: Kind, sizes: Sizes, setting: Setting, rates: Rates) -> int | None:
    """The largest batch whose passes wait for the memory; None if a single request's does not.

    MOST_REQUESTS if all do: the keys and values of many requests keep causal decoding at the memory.
    """
    batches = range(1, MOST_REQUESTS + 1)
    return last_batch(batches, [pass_work(kind, sizes, setting, one).is_memory_bound(rates) for one in batches])


def pays_up_to(kind: Kind, sizes: Sizes, setting: Setting, rates: Rates) -> int | None:
    """The largest batch at which this kind may give more tokens a second than causal decoding; None if none does."""
    batches = range(1, MOST_REQUESTS + 1)
    return last_batch(
        batches,
        [
            tokens_per_second(kind, sizes, setting, one, rates)
            > tokens_per_second("causal", sizes, setting, one, rates)
            for one in batches
        ],
    )
