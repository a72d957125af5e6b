"""Self-speculative decoding: one set of weights drafts a block with a gated adapter and verifies it without.

Axes: R = requests, Q = rows of a forward, C = guesses, S = positions scored (C + 1), T = draft rows.

A cycle takes two passes. The first computes the pending tokens on the base, the last of which says what comes next, and
behind them masks on base + adapter, of which the one at position p guesses token p + 1. The second pass verifies the
guesses on the base alone. So the tokens are those of autoregressive decoding, at any temperature: guesses are drawn
with the noise of their positions, and a guess is right if it equals the base's own draw. The keys and values of the
masks stand in slots that no later forward sees.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from fewstep.decode.causal import Causal, accept_agreed, verify
from fewstep.decode.decoder import Accepted, Shape, Traits, cached_plan, grouped_passes
from fewstep.decode.requests import Output
from fewstep.decode.resources import Resources
from fewstep.decode.state import State, scored_positions, write
from fewstep.decode.steps import draw_tokens
from fewstep.errors import FewstepError
from fewstep.models.network import Plan, Scores
from fewstep.models.roles import INVISIBLE
from fewstep.values import Count, check_fields

if TYPE_CHECKING:
    from fewstep.models.gated import GatedAdapter
else:  # its file loads PEFT, which takes a second
    GatedAdapter = Any


def where_drafts_began(output: Output) -> Tensor:
    """Of each token of an answer of this decoder, whether a draft began at it; boolean, on the CPU.

    A request's passes draft and verify in turn, and a draft pass finalises the one token at which its draft begins.
    """
    return output.step_G[: output.num_tokens] % 2 == 1


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(Causal):
    """`window` guesses in each cycle of two passes.

    Plan shapes: `draft` (W pending rows and `window` masks; W = 1, or more for requests that begin) and `verify` (1 +
    window rows).
    """

    name: ClassVar[str] = "self-speculative"

    adapter: GatedAdapter
    window: Annotated[Count, "Guesses per pass."] = 16

    def __post_init__(self) -> None:
        check_fields(self, self.name)

    @classmethod
    def build(cls, resources: Resources, **given: Any) -> Self:
        """FewstepError for a network without a gated adapter."""
        if resources.adapter is None:
            raise FewstepError(
                "the self-speculative decoder needs a model with a gated adapter; fewstep train draft makes one"
            )
        return cls(role=resources.role, adapter=resources.adapter, **given)

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            roles=("autoregressive",),
            cached=True,
            num_guessed=self.window + 1,
            pass_length=1 + self.window,
            branching=True,
        )

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(1,), active=self.window):
            yield members, [Shape("draft", width), Shape("verify", 1)]

    def plan(self, state: State, shape: Shape) -> Plan:
        if shape.kind == "verify":
            return cached_plan(shape.kind, state, self.role, width=1, active=self.window)
        trunk = cached_plan(shape.kind, state, self.role, width=shape.width, active=0)
        assert trunk.slots_RQ is not None
        device, length = state.tokens_RL.device, state.tokens_RL.shape[1]
        done_R1 = state.done_R[:, None]
        places_RT = scored_positions(state, self.window)
        # What follows the end of the canvas is never used; its rows stay within the positions that the network knows.
        positions_RT = places_RT.minimum(state.canvas_end_R[:, None] - 1).clamp(min=0)
        blocks_RT = torch.where(done_R1, INVISIBLE, state.front_R[:, None] - 1).expand_as(places_RT)
        is_mask_Q = torch.arange(shape.width + self.window, device=device) >= shape.width
        return replace(
            trunk,
            tokens_RQ=torch.cat([trunk.tokens_RQ, torch.full_like(places_RT, self.adapter.mask_token_id)], 1),
            positions_RQ=torch.cat([trunk.positions_RQ, positions_RT], 1),
            blocks_RQ=torch.cat([trunk.blocks_RQ, blocks_RT], 1),
            slots_RQ=torch.cat([trunk.slots_RQ, torch.where(done_R1, length, places_RT)], 1),
            scored_RS=(shape.width - 1 + torch.arange(self.window + 1, device=device)).expand(len(places_RT), -1),
            tree_TT=torch.ones((self.window, self.window), dtype=torch.bool, device=device),
            adapted_RQ=is_mask_Q.expand(len(places_RT), -1),
        )

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        if shape.kind == "verify":
            return verify(self, state, shape, scores)[0]
        positions_RS = scored_positions(state, self.window + 1)
        turn_RS = positions_RS - state.context_length_R[:, None] + 1
        tokens_RS = draw_tokens(shape.drawing, state, scores.logits_RSV, positions_RS, turn_RS)
        open_RS = ~state.final_RL.gather(1, positions_RS) & ~state.done_R[:, None]
        guessed = replace(state, tokens_RL=write(state.tokens_RL, positions_RS, open_RS, tokens_RS))
        return accept_agreed(self, guessed, tokens_RS, torch.zeros_like(open_RS), scores)
