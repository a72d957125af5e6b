"""Uncached masked-diffusion decoding: the published teacher. LLaDA, arXiv 2502.09992; Dream, arXiv 2508.15487.

Every step forwards the whole context and canvas. Blocks are a schedule only: the leftmost unfinished one is decoded
first.

Axes: as in `state`, and Q = rows of a forward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from fewstep.decode.building import BlockSize, ChosenPolicy
from fewstep.decode.declarations import Details
from fewstep.decode.decoder import (
    Accepted,
    Shape,
    Traits,
    canvas_length,
    open_canvas,
    whole_blocks,
)
from fewstep.decode.own_policies import as_policy
from fewstep.decode.policies import ONE_PER_STEP, DreamSchedule, Policy
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.resources import Resources
from fewstep.decode.state import NEVER, State
from fewstep.decode.steps import Finalising, accept, integers, padded_tokens
from fewstep.errors import FewstepError
from fewstep.models.network import Guidance, Plan, Scores
from fewstep.models.roles import INVISIBLE, Role
from fewstep.values import Count, check_fields

LENGTH_BUCKET = 16
"""Forwards are multiples of this long, so that there are few shapes."""

GuidanceScale = Annotated[float, Ge(0), Le(1000)]
"""0 is no guidance; at 1000 nothing of the unguided answer is left in float32."""


@dataclass(frozen=True, kw_only=True)
class DiffusionState(State):
    """What paced policies and infilling need; E = tokens that end an answer."""

    barred_RE: Tensor  # tokens that no position takes which something given follows; NEVER = none
    block_step_R: Tensor  # steps spent in the current block
    block_index_R: Tensor  # blocks finished before the current one
    num_blocks_R: Tensor  # blocks with open positions, in all
    num_steps_R: Tensor  # steps over the canvas


@dataclass(frozen=True, kw_only=True)
class Diffusion(Finalising):
    """`steps` over the canvas are split evenly over its blocks, the remainder to the first; None is one per token.

    They matter to paced policies only (`EvenSplit`, `Origin`). A block without masks gives up the rest of its steps: no
    pass is run that cannot finalise anything. `canvas_length`: the positions for the answer that the network sees, by
    default `max_new_tokens` rounded up to whole blocks; a bidirectional network's result depends on it. A block-causal
    network is decoded as its role says, without the cache. `cfg_scale` above 0 guides by the network's answer to a
    context that is masked out, like LLaDA's; a pass then has twice the rows.
    """

    name: ClassVar[str] = "diffusion"
    runs_paced: ClassVar[bool] = True

    role: Role
    block_size: Count
    policy: Policy = ONE_PER_STEP
    steps: Count | None = None
    canvas_length: Annotated[
        Count | None,
        "Length of the canvas, the positions for the answer that the network sees.",
        Details(default="max_new_tokens in whole blocks"),
    ] = None
    cfg_scale: Annotated[GuidanceScale, "Scale of LLaDA's classifier-free guidance."] = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", as_policy(self.policy))
        check_fields(self)
        if self.role.name == "block_causal" and self.block_size != self.role.block_size:
            raise FewstepError(
                f"the attention has blocks of {self.role.block_size}, so the schedule cannot have {self.block_size}"
            )

    @classmethod
    def build(
        cls, resources: Resources, *, policy: ChosenPolicy, block_size: BlockSize = None, **given: Any
    ) -> "Diffusion":
        """By default one token per pass, in blocks as the network's role says; with `steps` in an even split."""
        role, steps = resources.role, policy.settings.get("steps")
        if role.name == "block_causal" and block_size is not None:
            role = replace(role, block_size=block_size)
        resources = replace(resources, canvas_length=given.get("canvas_length") or resources.canvas_length)
        made = policy.made(resources, default="fixed" if steps is None else "even")
        if isinstance(made, DreamSchedule) and block_size is not None:
            raise FewstepError("alg is Dream's own sampler, which takes no block_size; set one or the other")
        if block_size is None:
            block_size = resources.canvas_length if isinstance(made, DreamSchedule) else role.block_size
        return cls(role=role, block_size=block_size, policy=made, steps=steps, **given)

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            roles=("bidirectional", "block_causal"),
            cached=False,
            pass_length=self.block_size,
            guided=self.cfg_scale > 0,
        )

    def canvas(self, request: Request) -> Canvas:
        canvas = self._fresh_canvas(request) if request.canvas is None else self._given_canvas(request.canvas)
        start = len(request.prompt_ids) - self.role.first_block_start(len(request.prompt_ids))
        num_blocks = len({(start + i) // self.block_size for i, is_open in enumerate(canvas.open) if is_open})
        num_steps = self.steps or sum(canvas.open)
        if num_steps < num_blocks:
            raise FewstepError(
                f"{num_steps} steps are fewer than the {num_blocks} blocks of the canvas; raise steps or the block size"
            )
        return replace(canvas, num_blocks=num_blocks, num_steps=num_steps)

    def _fresh_canvas(self, request: Request) -> Canvas:
        length = self.canvas_length or canvas_length(self.role, request, self.block_size)
        if length < request.max_new_tokens:
            raise FewstepError(
                f"max_new_tokens {request.max_new_tokens} exceeds the canvas of {length}; "
                "lower it or raise canvas_length"
            )
        return open_canvas(request, length, self._mask_token_id)

    def _given_canvas(self, tokens: list[int]) -> Canvas:
        opened = [token == self._mask_token_id for token in tokens]
        if not any(opened):
            raise FewstepError("there is nothing to fill in: the canvas holds no mask token")
        return Canvas(tokens=tokens, open=opened, decode_length=len(tokens), stops_early=False)

    @property
    def _mask_token_id(self) -> int:
        assert self.role.mask_token_id is not None  # Role refuses a diffusion role without one
        return self.role.mask_token_id

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        yield torch.arange(len(length_R)), [Shape("full", whole_blocks(int(length_R.max()), LENGTH_BUCKET))]

    def plan(self, state: State, shape: Shape) -> Plan:
        device = state.tokens_RL.device
        tokens_RQ = state.tokens_RL[:, : shape.width]
        positions_RQ = torch.arange(tokens_RQ.shape[1], device=device).expand_as(tokens_RQ)
        inert_RQ = (positions_RQ >= state.canvas_end_R[:, None]) | state.done_R[:, None]
        return Plan(
            kind=shape.kind,
            tokens_RQ=tokens_RQ,
            positions_RQ=positions_RQ,
            blocks_RQ=torch.where(inert_RQ, INVISIBLE, self.role.blocks(positions_RQ, state.context_length_R[:, None])),
            slots_RQ=None,
            scored_RS=state.front_R[:, None] + torch.arange(self.block_size, device=device),
            guidance=self._guidance(state, tokens_RQ) if self.traits.guided else None,
        )

    def start(self, state: State, requests: Sequence[Request], canvases: Sequence[Canvas]) -> State:
        zeros_R = torch.zeros_like(state.front_R)
        ends = [(request.stop_token_ids or ()) if request.canvas is not None else () for request in requests]
        return DiffusionState(
            **vars(state),
            barred_RE=padded_tokens(ends, state.settings.stop_tokens_RE.shape[1]),
            block_step_R=zeros_R,
            block_index_R=zeros_R,
            num_blocks_R=integers(canvas.num_blocks for canvas in canvases),
            num_steps_R=integers(canvas.num_steps for canvas in canvases),
        )

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        assert isinstance(state, DiffusionState)
        _bar(state, scores.logits_RSV)
        accepted = accept(self, state, shape, scores, _steps_left(state)[:, None] if self.policy.paced else None)
        after = accepted.state
        moved_R = after.front_R != state.front_R
        block_step_R = torch.where(moved_R, 0, state.block_step_R + ~state.done_R)
        after = replace(after, block_step_R=block_step_R, block_index_R=state.block_index_R + moved_R)
        return replace(accepted, state=after)

    def _guidance(self, state: State, tokens_RQ: Tensor) -> Guidance:
        """The same tokens with all given positions masked."""
        given_RQ = state.step_RL[:, : tokens_RQ.shape[1]] == 0
        return Guidance(tokens_RQ.masked_fill(given_RQ, self._mask_token_id), self.cfg_scale)


def _steps_left(state: DiffusionState) -> Tensor:
    """Steps left in the current block, this one included: the total split evenly, the remainder to the first blocks."""
    num_blocks_R = state.num_blocks_R.clamp(min=1)  # a free slot has none
    each_R = state.num_steps_R // num_blocks_R
    has_one_more_R = state.block_index_R < state.num_steps_R % num_blocks_R
    return (each_R + has_one_more_R - state.block_step_R).clamp(min=1)


def _bar(state: DiffusionState, logits_RSV: Tensor) -> None:
    """Rule out, in place, what would end the text before something given: otherwise models that pad with the
    end-of-text would fill a gap with it.
    """
    position_L = torch.arange(state.tokens_RL.shape[1], device=logits_RSV.device)
    given_RL = (state.step_RL == 0) & (position_L < state.canvas_end_R[:, None])
    last_given_R = torch.where(given_RL, position_L, -1).amax(1)
    positions_RS = state.front_R[:, None] + torch.arange(logits_RSV.shape[1], device=logits_RSV.device)
    before_given_RS1 = (positions_RS < last_given_R[:, None])[..., None]
    for barred_R in state.barred_RE.unbind(1):
        token_RS1 = barred_R.clamp_min(0)[:, None, None].expand(-1, logits_RSV.shape[1], 1)
        barred_RS1 = before_given_RS1 & (barred_R != NEVER)[:, None, None]
        kept_RS1 = logits_RSV.gather(-1, token_RS1).masked_fill(barred_RS1, float("-inf"))
        logits_RSV.scatter_(-1, token_RS1, kept_RS1)
