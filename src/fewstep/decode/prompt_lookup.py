"""Prompt lookup decoding: guess what followed an earlier occurrence of the last tokens.

A. Saxena, "Prompt Lookup Decoding" (2023); LLMA, arXiv 2304.04487. Axes: R = requests, L = positions, C = guesses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.decode.causal import Causal, NGram, verify
from fewstep.decode.decoder import Accepted, Shape, Traits, cached_plan, grouped_passes
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.state import State, scored_positions, write
from fewstep.models.network import Plan, Scores
from fewstep.values import Count, check_fields


@dataclass(frozen=True, kw_only=True)
class PromptLookup(Causal):
    """`window` guesses per pass, from the longest match of up to `ngram` tokens, in the prompt or the answer so far.

    Guesses are copied, not drawn, so sampling needs no correction: the token is drawn as always, and the guess either
    equals it or not. Plan shapes: `verify` (1 + window rows) and `prefill` (W + window).
    """

    name: ClassVar[str] = "prompt-lookup"

    window: Annotated[Count, "Guesses per pass."] = 10
    ngram: Annotated[NGram, "Guess what followed the longest match of up to this many last tokens."] = 3

    def __post_init__(self) -> None:
        check_fields(self, self.name)

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            roles=("autoregressive",),
            cached=True,
            num_guessed=self.window,
            pass_length=1 + self.window,
            steady=(Shape("verify", 1),),
        )

    def start(self, state: State, requests: Sequence[Request], canvases: Sequence[Canvas]) -> State:
        return self._with_guesses(state)

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(1,), active=self.window):
            yield members, [Shape("verify" if width == 1 else "prefill", width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        return cached_plan(shape.kind, state, self.role, width=shape.width, active=self.window)

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        accepted, _ = verify(self, state, shape, scores)
        return replace(accepted, state=self._with_guesses(accepted.state))

    def _with_guesses(self, state: State) -> State:
        positions_RC = scored_positions(state, self.window)
        open_RC = ~state.final_RL.gather(1, positions_RC) & ~state.done_R[:, None]
        guesses_RC, _ = look_up(state.tokens_RL, state.front_R, self.ngram, self.window)
        return replace(state, tokens_RL=write(state.tokens_RL, positions_RC, open_RC, guesses_RC))


def look_up(tokens_RL: Tensor, front_R: Tensor, ngram: int, count: int) -> tuple[Tensor, Tensor]:
    """What followed the last tokens before the front at an earlier occurrence: guesses [R, C], and whether there was
    one.

    The occurrence is the one with the most matching tokens, up to `ngram`, and of several such the latest. If fewer
    than `count` tokens follow it, they are repeated, as in a text that repeats itself.
    """
    length = tokens_RL.shape[1]
    position_L = torch.arange(length, device=tokens_RL.device)
    last_R1 = front_R[:, None] - 1
    matches_RL = position_L < last_R1
    num_matching_RL = torch.zeros_like(tokens_RL)
    for back in range(min(ngram, length)):
        suffix_R1 = tokens_RL.gather(1, (last_R1 - back).clamp(min=0))
        before_RL = tokens_RL.roll(back, 1)
        matches_RL = matches_RL & (before_RL == suffix_R1) & (position_L >= back)
        num_matching_RL += matches_RL
    best_R1 = (num_matching_RL * length + position_L).masked_fill(num_matching_RL == 0, -1).argmax(1, keepdim=True)
    period_R1 = (last_R1 - best_R1).clamp(min=1)
    follow_RC = best_R1 + 1 + torch.arange(count, device=tokens_RL.device) % period_R1
    return tokens_RL.gather(1, follow_RC.clamp(max=length - 1)), (num_matching_RL > 0).any(1)
