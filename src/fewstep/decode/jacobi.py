"""Jacobi decoding: guess a window of tokens and replace all by the network's answer until nothing changes.

Santilli et al., arXiv 2305.10427; CLLM, arXiv 2403.00835. Axes: R = requests, L = positions, S = positions scored, N =
positions of a window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from fewstep.decode.causal import Causal, NGram, verify
from fewstep.decode.declarations import Details
from fewstep.decode.decoder import Accepted, Shape, Traits, cached_plan, grouped_passes
from fewstep.decode.prompt_lookup import look_up
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.resources import Resources
from fewstep.decode.sampling import noise_keys, uniform
from fewstep.decode.state import State, scored_positions, write
from fewstep.models.network import Plan, Scores
from fewstep.values import Count, check_fields


@dataclass(frozen=True, kw_only=True)
class Jacobi(Causal):
    """A window of `window` guesses; those that are right, from the left up to the first wrong one, become final and
    cached at once.

    The window slides: as many new guesses enter at its end as tokens became final. With `fixed_windows` windows stand
    one after the other, as published, and the next begins when one is final; trajectories for training are made this
    way. New guesses are random tokens of the prompt, or, with `ngram`, what followed the longest match of up to `ngram`
    of the last final tokens. It takes at most one pass per token. Greedy only. Plan shapes: `iterate` (window rows) and
    `prefill` (W + window - 1).
    """

    name: ClassVar[str] = "jacobi"

    window: Annotated[Count, "Guesses per pass.", Details(default="16, or as trained")] = 16
    ngram: Annotated[
        NGram | None,
        "Guess what followed the longest match of up to this many last tokens.",
        Details(default="random guesses"),
    ] = None
    fixed_windows: Annotated[
        bool, "Decode in fixed windows one after the other, as published, instead of one that slides."
    ] = False

    def __post_init__(self) -> None:
        check_fields(self, self.name)

    @classmethod
    def build(cls, resources: Resources, **given: Any) -> Self:
        """The window is that of the checkpoint, if it was trained on one."""
        trained = resources.role.jacobi_window
        return cls(role=resources.role, **({} if trained is None else {"window": trained}) | given)

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            roles=("autoregressive",),
            cached=True,
            num_guessed=self.window,
            pass_length=self.window,
            greedy_only=True,
            steady=(Shape("iterate", 1),),
        )

    def start(self, state: State, requests: Sequence[Request], canvases: Sequence[Canvas]) -> State:
        return self._filled(state, state.front_R, ~state.done_R)

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(1,), active=self.window - 1):
            yield members, [Shape("iterate" if width == 1 else "prefill", width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        end_R = torch.minimum(self.window_end(state) - 1, state.canvas_end_R)
        return cached_plan(shape.kind, state, self.role, width=shape.width, active=self.window - 1, end_R=end_R)

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        end_R = self.window_end(state)
        accepted, tokens_RS = verify(self, state, shape, scores, end_R)
        after = accepted.state
        positions_RS = scored_positions(state, tokens_RS.shape[1])
        guessed_RS = ~after.final_RL.gather(1, positions_RS) & (positions_RS < end_R[:, None]) & ~state.done_R[:, None]
        after = replace(after, tokens_RL=write(after.tokens_RL, positions_RS, guessed_RS, tokens_RS))
        filled = self._filled(after, end_R, ~after.done_R & (self.window_end(after) > end_R))
        return replace(accepted, state=filled)

    def window_end(self, state: State) -> Tensor:
        """The position after the window that the front is in, [R]; the last window may reach past the canvas."""
        if not self.fixed_windows:
            return state.front_R + self.window
        return state.front_R + self.window - (state.front_R - state.context_length_R) % self.window

    def first_guesses(self, state: State, start_R: Tensor) -> Tensor:
        """What a window that begins at `start_R` is filled with before its first pass, [R, N]."""
        positions_RN = start_R[:, None] + torch.arange(self.window, device=start_R.device)
        picks_RN = uniform(noise_keys(state.settings.seed_R, positions_RN, torch.zeros_like(start_R)), 1)[..., 0]
        guesses_RN = state.tokens_RL.gather(1, (picks_RN * state.context_length_R[:, None]).long())
        if self.ngram is None:
            return guesses_RN
        found_RN, is_found_R = look_up(state.tokens_RL, start_R, self.ngram, self.window)
        return torch.where(is_found_R[:, None], found_RN, guesses_RN)

    def _filled(self, state: State, end_R: Tensor, fresh_R: Tensor) -> State:
        """With new guesses for these requests, from the position `end_R` to the end of the window."""
        positions_RN = scored_positions(state, self.window)
        chosen_RN = ~state.final_RL.gather(1, positions_RN) & (positions_RN >= end_R[:, None]) & fresh_R[:, None]
        guesses_RN = self.first_guesses(state, state.front_R)
        return replace(state, tokens_RL=write(state.tokens_RL, positions_RN, chosen_RN, guesses_RN))
