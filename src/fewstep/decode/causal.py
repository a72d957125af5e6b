"""What the decoders of causal networks share: guesses, and the rule by which a forward verifies them.

Axes: R = requests, S = positions scored in a step, L = positions.

A causal row scores the next token. So a forward of the last final token and the guesses after it gives, for each guess,
the token that belongs in its place if all guesses before it are right: guesses are right up to the first that differs,
and the token that belongs there becomes final too. Autoregressive decoding is the case without guesses. Whatever is
guessed, the tokens are those of autoregressive decoding; good guesses reduce the number of passes.

The keys and values of right guesses were computed from final tokens, so they count as cached. Those of wrong ones stay
in their slots, which no row sees before they are overwritten: a causal row sees positions before its own only.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Le
from torch import Tensor

from fewstep.decode.decoder import Accepted, Decoder, Shape, Traits, open_canvas
from fewstep.decode.policies import ONE_PER_STEP, Policy
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.resources import Resources
from fewstep.decode.sampling import confidence
from fewstep.decode.state import StateT, is_stop, scored_positions
from fewstep.decode.steps import Finalising, draw_tokens, finalise
from fewstep.errors import FewstepError
from fewstep.models.network import Scores
from fewstep.models.roles import Role

NGram = Annotated[int, Ge(1), Le(1024)]
"""Tokens of an n-gram or of a match, each of which costs every pass a look at the whole text."""


@dataclass(frozen=True, kw_only=True)
class Causal(Finalising):
    """A subclass brings its name, `passes` and `plan`, and `traits` and `accept` if it guesses."""

    name: ClassVar[str]
    block_size: ClassVar[int] = 1
    policy: ClassVar[Policy] = ONE_PER_STEP

    role: Role

    @classmethod
    def build(cls, resources: Resources, **given: Any) -> Self:
        """With the settings that were given; a subclass adds what else it needs."""
        return cls(role=resources.role, **given)

    @cached_property
    def traits(self) -> Traits:
        return Traits(roles=("autoregressive",), cached=True, pass_length=1)

    def canvas(self, request: Request) -> Canvas:
        if request.canvas is not None:
            raise FewstepError(f"the {self.name} decoder cannot infill; use a bidirectional model")
        return open_canvas(request, request.max_new_tokens, 0)


def accept_agreed(
    decoder: Decoder, state: StateT, tokens_RS: Tensor, agreed_RS: Tensor, scores: Scores, end_R: Tensor | None = None
) -> Accepted[StateT]:
    """Of the tokens at the S positions from the front on, make those final that only agreed guesses precede.

    `agreed_RS`: whether the guess at the position is the token. None past an end-of-text, or from `end_R` on.
    """
    positions_RS = scored_positions(state, tokens_RS.shape[1])
    goes_on_RS = agreed_RS & ~is_stop(state, tokens_RS)
    reached_RS = torch.ones_like(goes_on_RS)
    reached_RS[:, 1:] = goes_on_RS[:, :-1].cumprod(1).bool()
    chosen_RS = reached_RS & ~state.final_RL.gather(1, positions_RS) & ~state.done_R[:, None]
    if end_R is not None:
        chosen_RS &= positions_RS < end_R[:, None]
    return finalise(decoder, state, tokens_RS, chosen_RS, confidence(scores.logits_RSV, tokens_RS))


def keep_agreed(accepted: Accepted[StateT]) -> Accepted[StateT]:
    """After `accept_agreed` of guesses that stood in their own slots: all final tokens but the last are cached."""
    state = accepted.state
    return replace(
        accepted, state=replace(state, cached_R=torch.where(state.done_R, state.cached_R, state.front_R - 1))
    )


def verify(
    decoder: Decoder, state: StateT, shape: Shape, scores: Scores, end_R: Tensor | None = None
) -> tuple[Accepted[StateT], Tensor]:
    """The state after a pass over the guesses at the open positions, and the tokens that belong there [R, S].

    The last of the S positions was not guessed, or its guess is not used. A position is drawn with the noise of the
    step in which autoregressive decoding comes to it, so that with the same seed sampled tokens are the same too.
    """
    positions_RS = scored_positions(state, scores.logits_RSV.shape[1])
    turn_RS = positions_RS - state.context_length_R[:, None] + 1
    tokens_RS = draw_tokens(shape.drawing, state, scores.logits_RSV, positions_RS, turn_RS)
    agreed_RS = state.tokens_RL.gather(1, positions_RS) == tokens_RS
    return keep_agreed(accept_agreed(decoder, state, tokens_RS, agreed_RS, scores, end_R)), tokens_RS
