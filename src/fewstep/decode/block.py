"""Block decoding of a block-causal student with an exact KV cache. CDLM, arXiv 2511.19269.

Blocks are decoded left to right. Since no row sees a later block, a finished block's keys and values are exact once
they are computed from its final tokens, and that commit shares the forward of the next block's first step.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from fewstep.decode.building import BlockSize, ChosenPolicy
from fewstep.decode.decoder import Shape, Traits, cached_plan, canvas_length, grouped_passes, open_canvas
from fewstep.decode.own_policies import as_policy
from fewstep.decode.policies import CONFIDENT, Policy
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.resources import Resources
from fewstep.decode.state import State
from fewstep.decode.steps import Finalising
from fewstep.errors import FewstepError
from fewstep.models.network import Plan
from fewstep.models.roles import Role


@dataclass(frozen=True, kw_only=True)
class Block(Finalising):
    """A pass finalises as many tokens as the policy chooses. Plan shapes: `denoise` (B rows), `commit` (2 B) and
    `prefill`.
    """

    name: ClassVar[str] = "block"

    role: Role
    policy: Policy = CONFIDENT
    block_size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", self.role.block_size)
        object.__setattr__(self, "policy", as_policy(self.policy))
        if self.policy.paced:
            raise FewstepError("the block decoder takes no step schedule; set a threshold or use the diffusion decoder")

    @classmethod
    def build(cls, resources: Resources, *, policy: ChosenPolicy, block_size: BlockSize = None) -> "Block":
        """By default with the threshold, gaps and blocks of the network's role."""
        role = resources.role
        if block_size not in (None, role.block_size) and role.name == "block_causal":
            warnings.warn(
                f"the model was trained in blocks of {role.block_size} positions; in blocks of {block_size} its rows "
                "see others than in training, and it may solve less",
                stacklevel=2,
            )
            role = replace(role, block_size=block_size)
        return cls(role=role, policy=policy.made(resources, default="threshold"))

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            roles=("block_causal",),
            cached=True,
            pass_length=self.block_size,
            steady=(Shape("commit", self.block_size),),
        )

    def canvas(self, request: Request) -> Canvas:
        if request.canvas is not None:
            raise FewstepError("the block decoder cannot infill: no block sees a later one; use a bidirectional model")
        assert self.role.mask_token_id is not None
        length = canvas_length(self.role, request, self.block_size)
        return open_canvas(request, length, self.role.mask_token_id)

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(0, self.block_size), active=self.block_size):
            yield members, [Shape({0: "denoise", self.block_size: "commit"}.get(width, "prefill"), width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        return cached_plan(shape.kind, state, self.role, width=shape.width, active=self.block_size)
