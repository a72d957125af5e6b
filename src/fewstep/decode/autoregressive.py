"""Autoregressive decoding with a KV cache: blocks of a single token, scored by the last pending row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from fewstep.decode.causal import Causal
from fewstep.decode.decoder import Accepted, Shape, Traits, cached_plan, grouped_passes
from fewstep.decode.sampling import confidence
from fewstep.decode.state import State
from fewstep.decode.steps import draw_tokens, finalise
from fewstep.models.network import Plan, Scores


@dataclass(frozen=True, kw_only=True)
class Autoregressive(Causal):
    """One token per pass. Plan shapes: `decode` (one row a request) and `prefill`."""

    name: ClassVar[str] = "autoregressive"

    @cached_property
    def traits(self) -> Traits:
        return replace(super().traits, steady=(Shape("decode", 1),))

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(1,), active=0):
            yield members, [Shape("decode" if width == 1 else "prefill", width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        return cached_plan(shape.kind, state, self.role, width=shape.width, active=0)

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        """Where one position is open there is nothing to choose."""
        positions_R1 = state.front_R[:, None]
        live_R = ~state.done_R
        tokens_R1 = draw_tokens(shape.drawing, state, scores.logits_RSV, positions_R1, state.num_forwards_R + live_R)
        open_R1 = ~state.final_RL.gather(1, positions_R1) & live_R[:, None]
        return finalise(self, state, tokens_R1, open_R1, confidence(scores.logits_RSV, tokens_R1))
