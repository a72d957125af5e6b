"""What a decoder is, and what the cached ones share.

Axes: R = requests, Q = rows of a forward, A = active rows of a request, W = room for its pending rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from fewstep.decode.policies import Policy, Threshold
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.state import State
from fewstep.models.network import Network, Plan, Scores
from fewstep.models.roles import INVISIBLE, Role, RoleName

FREE_ROWS = 128
"""Up to about this many rows a forward takes as long as reading the weights, and one pass for all requests is best."""

PREFILL_BUCKET = 16
"""Prefill shapes are multiples of this, so that there are few of them."""


Drawing = Literal["greedy", "sampled", "filtered"]
"""How the tokens of a pass are drawn: none of its requests samples; some do; some of them by top-k or top-p."""

DRAWINGS: tuple[Drawing, ...] = get_args(Drawing)


def drawing_of(request: Request) -> Drawing:
    """The drawing that this request needs by itself."""
    if request.sampling.greedy:
        return "greedy"
    return "filtered" if request.sampling.filtered else "sampled"


@dataclass(frozen=True)
class Shape:
    """Passes of equal shape have the same tensor shapes and the same computation, so they can be captured as one graph.

    A decoder's `passes` names the plan's kind and how many rows it has room for (`width` counts pending rows, in an
    uncached forward all rows); the loop adds the number of requests, how many slots of the cache attention reads (0
    without a cache), and the drawing.
    """

    kind: str
    width: int
    rows: int = 0
    cache_length: int = 0
    drawing: Drawing = "greedy"


@dataclass(frozen=True, kw_only=True)
class Round:
    """What the host has seen of a round, for the r requests that were live in it; tensors on the CPU.

    `shapes`: of the passes of each group, as the decoder named them. `advance_r`: by how many positions the front
    moved. `pending_r`: as in State, after the round. `told_Xr`: `State.told`.
    """

    shapes: Sequence[Sequence[Shape]]
    seconds: float
    advance_r: Tensor
    pending_r: Tensor
    told_Xr: Tensor


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the loop has to know about a decoder; a step does not read it.

    `roles`: the roles of networks that it can run. `cached`: whether passes read and write a KV cache. `guided`:
    whether logits come from two forwards, so that no hidden row gives them. `branching`: whether guesses branch, so
    that the rows scored are not those of neighbouring positions. `greedy_only`: whether it refuses requests that
    sample. `pass_length`: how many positions from the front on a pass may read, or write to the cache. `num_guessed`:
    how many positions from the front on hold guesses, 0 for a decoder that does not guess. `companions`: the networks
    that plans name besides "target", each with a cache of its own. `observe` is given every round, for a decoder that
    learns from them how to split requests into passes. `steady`: the passes of a step that are right for every live
    request after its first step, whatever the last one left pending; none for a decoder that has to be told first.
    """

    roles: tuple[RoleName, ...]
    cached: bool
    pass_length: int
    num_guessed: int = 0
    guided: bool = False
    branching: bool = False
    greedy_only: bool = False
    companions: Mapping[str, Network] = field(default_factory=dict)
    observe: Callable[[Round], None] | None = None
    steady: Sequence[Shape] = ()


AnyState = TypeVar("AnyState", bound=State, covariant=True)


@dataclass(frozen=True)
class Accepted(Generic[AnyState]):
    """What `accept` says: the state after the pass, the positions that it scored, and which of them it made final.

    Both are None after a pass of a draft.
    """

    state: AnyState
    positions_RS: Tensor | None = None
    chosen_RS: Tensor | None = None


class Decoder(Protocol):
    """Lays requests out and groups them into passes, on the host; the rest only computes with tensors.

    A step is one pass or several: each is `plan`, one forward of the network that the plan names, `accept`. What a
    decoder remembers from step to step is a tensor with the requests first, in a subclass of State that `start` makes.
    A decoder keeps the settings that shape a forward; settings that may differ between requests are in the request. Its
    `policy` is the kind of rule, and gives the numbers for requests that bring none.
    """

    name: ClassVar[str]

    @property
    def role(self) -> Role: ...
    @property
    def block_size(self) -> int: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def traits(self) -> Traits: ...

    def canvas(self, request: Request) -> Canvas:
        """The room for new tokens. FewstepError if the request cannot be decoded so."""

    def start(self, state: State, requests: Sequence[Request], canvases: Sequence[Canvas]) -> State:
        """The state of requests that begin, on the CPU, with what this decoder remembers."""

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        """Split live requests into groups: indices into them, and the passes of their step; every request once.

        CPU tensors: `pending_R` as in State, `length_R` the positions a request takes up, in whole blocks. Without a
        cache `pending_R` may be that of the round before, so it must not matter.
        """

    def plan(self, state: State, shape: Shape) -> Plan:
        """What to score in a pass of this shape."""

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        """The state after the pass, and what it made final."""


def threshold_rule(decoder: Decoder) -> dict[str, Any]:
    """`threshold`, `gaps` and `block_size` as reports name them; those of the checkpoint where no setting was given.

    None: the policy is no `Threshold`, gaps are not limited, a causal decoder has no blocks.
    """
    rule = decoder.policy if isinstance(decoder.policy, Threshold) else None
    return {
        "threshold": rule.at_least if rule else None,
        "gaps": rule.gaps if rule else None,
        "block_size": None if decoder.role.name == "autoregressive" else decoder.block_size,
    }


_Count = TypeVar("_Count", int, np.ndarray)


def whole_blocks(count: _Count, block_size: int) -> _Count:
    """`count` rounded up to whole blocks."""
    return -(-count // block_size) * block_size


def canvas_length(role: Role, request: Request, block_size: int) -> int:
    """`max_new_tokens` rounded up so that the canvas ends with a whole block."""
    tail = len(request.prompt_ids) - role.first_block_start(len(request.prompt_ids))
    return whole_blocks(tail + request.max_new_tokens, block_size) - tail


def open_canvas(request: Request, length: int, placeholder: int) -> Canvas:
    """A canvas of `length` open positions; all of it is decoded if the request does not stop early."""
    return Canvas(
        tokens=[placeholder] * length,
        open=[True] * length,
        decode_length=request.max_new_tokens if request.early_stop else length,
        stops_early=request.early_stop,
    )


def grouped_passes(pending_R: Tensor, shapes: Sequence[int], active: int) -> Iterator[tuple[Tensor, int]]:
    """Group requests by the smallest of the `shapes` that holds their pending rows; wider ones are prefilled together.

    A result depends on neither the grouping nor the width, since the rows beyond a request's pending ones are inert.
    """
    widest = int(pending_R.max())
    width = next((shape for shape in shapes if widest <= shape), whole_blocks(widest, PREFILL_BUCKET))
    if len(pending_R) * (width + active) <= FREE_ROWS:
        yield torch.arange(len(pending_R)), width
        return
    above = -1
    for shape in (*shapes, width):
        members = ((pending_R > above) & (pending_R <= shape)).nonzero()[:, 0]
        if len(members):
            yield members, shape
        above = shape


def cached_plan(kind: str, state: State, role: Role, *, width: int, active: int, end_R: Tensor | None = None) -> Plan:
    """Rows `[front - W, front + A)` of every request; inert are those before its pending ones, or past `end_R`.

    By default that is the end of the canvas. Scored are the positions from the front on: by the active rows, or by the
    last pending row and the active ones where a row scores the next token.
    """
    device = state.tokens_RL.device
    length = state.tokens_RL.shape[1]
    end_R = state.canvas_end_R if end_R is None else end_R
    positions_RQ = state.front_R[:, None] + torch.arange(-width, active, device=device)
    inert_RQ = (positions_RQ < state.cached_R[:, None]) | (positions_RQ >= end_R[:, None])
    inert_RQ |= state.done_R[:, None]
    # Inert rows too get positions that the request has: some rotary embeddings depend on the largest of a forward.
    positions_RQ = positions_RQ.minimum(state.canvas_end_R[:, None] - 1).clamp(min=0)
    first = width - 1 if role.name == "autoregressive" else width
    return Plan(
        kind=kind,
        tokens_RQ=state.tokens_RL.gather(1, positions_RQ),
        positions_RQ=positions_RQ,
        blocks_RQ=torch.where(inert_RQ, INVISIBLE, role.blocks(positions_RQ, state.context_length_R[:, None])),
        slots_RQ=torch.where(inert_RQ, length, positions_RQ),  # slot p holds position p; slot `length` is scratch
        scored_RS=torch.arange(first, width + active, device=device).expand(len(positions_RQ), -1),
        context_length_R=state.context_length_R,
    )
