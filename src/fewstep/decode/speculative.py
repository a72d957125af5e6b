"""Speculative decoding: another network drafts, the target verifies. arXiv 2211.17192."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

from torch import Tensor

from fewstep.decode.causal import Causal
from fewstep.decode.declarations import Details
from fewstep.decode.decoder import Accepted, Shape, Traits, cached_plan, grouped_passes
from fewstep.decode.drafts import BlockDraft, CausalDraft, Draft, DraftState
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.resources import Resources
from fewstep.decode.state import State
from fewstep.errors import FewstepError
from fewstep.models.network import Network, Plan, Scores
from fewstep.values import Count, check_fields

DEFAULT_WINDOW = 4
"""Tokens that a causal network drafts."""


@dataclass(frozen=True, kw_only=True)
class Speculative(Causal):
    """`window` tokens are drafted, then verified in one pass of the target.

    A causal `draft` takes a pass for each of them, by default 4 (`CausalDraft`), a block-causal one a single pass, by
    default for a block of its own size (`BlockDraft`). `sampled`: whether requests may sample.

    Plan shapes: `verify` (1 + window rows); `draft` of a causal network with 1 row, or 2 after a verification, of a
    block-causal one with 1 + 2 window; for requests that begin, `draft` and `verify` with more pending rows.
    """

    name: ClassVar[str] = "speculative"

    draft: Network
    window: Annotated[Count | None, "Guesses per pass.", Details(default="4, or the block of a block-causal draft")] = (
        None
    )
    sampled: bool = True

    def __post_init__(self) -> None:
        check_fields(self, self.name)

    @classmethod
    def build(
        cls,
        resources: Resources,
        *,
        draft: Annotated[
            str | None,
            "The model that drafts: a small causal or a block-causal one of the same vocabulary.",
            Details(reads="NAME"),
        ] = None,
        **given: Any,
    ) -> Self:
        """FewstepError without a draft."""
        if draft is None:
            raise FewstepError(
                "the speculative decoder needs a draft (--draft): name a small or a block-causal model of the same "
                "vocabulary"
            )
        return cls(role=resources.role, draft=resources.draft(draft), sampled=not resources.greedy, **given)

    @cached_property
    def drafting(self) -> Draft:
        """How the draft network drafts."""
        if self.draft.role.name == "block_causal":
            return BlockDraft(network=self.draft, count=self.window or self.draft.role.block_size)
        return CausalDraft(network=self.draft, count=self.window or DEFAULT_WINDOW, sampled=self.sampled)

    @cached_property
    def traits(self) -> Traits:
        count = self.drafting.count
        return Traits(
            roles=("autoregressive",),
            cached=True,
            num_guessed=count,
            pass_length=1 + count,
            companions={"draft": self.draft},
            greedy_only=not self.sampled,
            steady=(*self.drafting.shapes(1), Shape("verify", 1)),
        )

    def start(self, state: State, requests: Sequence[Request], canvases: Sequence[Canvas]) -> State:
        return self.drafting.start(state)

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(1,), active=self.drafting.count):
            yield members, [*self.drafting.shapes(width), Shape("verify", width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        assert isinstance(state, DraftState)
        if shape.kind == "verify":
            return cached_plan(shape.kind, state, self.role, width=shape.width, active=self.drafting.count)
        return self.drafting.plan(state, shape)

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        assert isinstance(state, DraftState)
        if shape.kind == "verify":
            return self.drafting.verify(self, state, shape, scores)
        return Accepted(self.drafting.accept(state, shape, scores))
