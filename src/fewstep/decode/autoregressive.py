"""Autoregressive decoding with a KV cache: blocks of a single token, scored by the last pending row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.decode.causal import Causal
from fewstep.decode.decoder import Shape, cached_plan, grouped_passes
from fewstep.decode.state import State
from fewstep.models.network import Plan


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Causal):
    """One token per pass. Plan shapes: `decode` (one row a request) and `prefill`."""

    name: ClassVar[str] = "autoregressive"

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(1,), active=0):
            yield members, [Shape("decode" if width == 1 else "prefill", width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        return cached_plan(shape.kind, state, self.role, width=shape.width, active=0)
