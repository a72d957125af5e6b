"""Autoregressive decoding with a KV cache: blocks of a single token, scored by the last pending row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.decode.decoder import cached_plan, grouped_passes, open_canvas
from fewstep.decode.policies import ONE_PER_STEP, Policy
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.sampling import GREEDY, Sampling
from fewstep.decode.state import State, accept
from fewstep.errors import FewstepError
from fewstep.models.network import Plan, Scores
from fewstep.models.roles import Role, RoleName


@dataclass(frozen=True, kw_only=True)
class Autoregressive:
    """One token per pass. Plan shapes: `decode` (one row a request) and `prefill`."""

    name: ClassVar[str] = "autoregressive"
    roles: ClassVar[tuple[RoleName, ...]] = ("autoregressive",)
    cached: ClassVar[bool] = True
    guided: ClassVar[bool] = False
    block_size: ClassVar[int] = 1
    policy: ClassVar[Policy] = ONE_PER_STEP

    role: Role
    sampling: Sampling = GREEDY
    early_stop: bool = True

    def canvas(self, request: Request) -> Canvas:
        if request.canvas is not None:
            raise FewstepError("the autoregressive decoder cannot infill; use a bidirectional model")
        return open_canvas(request.max_new_tokens, 0, limit=request.max_new_tokens, early_stop=self.early_stop)

    def passes(self, pending_R: Tensor, extent_R: Tensor) -> Iterator[tuple[Tensor, int]]:
        return grouped_passes(pending_R, shapes=(1,), active=0)

    def accept(self, state: State, scores: Scores) -> State:
        return accept(self, state, scores)

    def plan(self, state: State, width: int) -> Plan:
        return cached_plan("decode" if width == 1 else "prefill", state, self.role, width=width, active=0)
