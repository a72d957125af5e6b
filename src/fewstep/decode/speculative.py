"""Speculative decoding: a small network drafts, the target verifies. arXiv 2211.17192 and 2302.01318.

Axes: R = requests, C = drafted tokens, S = positions scored (C + 1), V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.decode.causal import Causal, accept_agreed, keep_agreed, verify
from fewstep.decode.decoder import Accepted, Shape, Traits, cached_plan, grouped_passes
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.sampling import gumbel_max, noise_keys, tempered, uniform
from fewstep.decode.state import State, scored_positions, write
from fewstep.models.network import Network, Plan, Scores
from fewstep.values import Count, check_fields

_DRAFT_STREAM, _ACCEPT_STREAM = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""Change the seed, so that drafting and accepting have noise of their own; the target's draws have the seed itself."""


@dataclass(frozen=True, kw_only=True)
class SpeculativeState(State):
    """`drafted_R` tokens stand at the front, not verified; the draft's cache holds the positions before
    `draft_cached_R`. `draft_probability_RCV`: what they were drawn from (V = 0 if none may be sampled).
    """

    drafted_R: Tensor
    draft_cached_R: Tensor
    draft_probability_RCV: Tensor


@dataclass(frozen=True, kw_only=True)
class Speculative(Causal):
    """`window` tokens are drafted one by one, then verified in one pass of the target.

    Greedy, a drafted token is right if it is the target's own. With sampling it is accepted with probability
    min(1, p/q), and the first that is not is replaced by a draw from max(0, p - q), which keeps the target's
    distribution; p and q are the networks' probabilities at the same temperature, top-k and top-p. `sampled`: whether
    requests may sample, for which the state keeps the draft's probabilities of the whole vocabulary.

    Plan shapes: `draft` of 1 row, or of 2 after a verification (the draft has not seen its last token); `verify`
    (1 + window rows); for requests that begin, `draft` and `verify` with more pending rows.
    """

    name: ClassVar[str] = "speculative"

    draft: Network
    window: Count = 4
    sampled: bool = True

    def __post_init__(self) -> None:
        check_fields(self, self.name)

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            roles=("autoregressive",),
            cached=True,
            num_guessed=self.window,
            pass_length=1 + self.window,
            companions={"draft": self.draft},
            greedy_only=not self.sampled,
        )

    def start(self, state: State, requests: Sequence[Request], canvases: Sequence[Canvas]) -> State:
        num_requests, num_tokens = len(state.done_R), self.draft.end_of_tokens if self.sampled else 0
        return SpeculativeState(
            **vars(state),
            drafted_R=torch.zeros_like(state.front_R),
            draft_cached_R=torch.zeros_like(state.front_R),
            draft_probability_RCV=torch.zeros((num_requests, self.window, num_tokens), dtype=torch.float64),
        )

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(1,), active=self.window):
            drafts = [Shape("draft", max(width, 2)), *[Shape("draft", 1)] * (self.window - 1)]
            yield members, [*drafts, Shape("verify", width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        assert isinstance(state, SpeculativeState)
        if shape.kind == "verify":
            return cached_plan(shape.kind, state, self.role, width=shape.width, active=self.window)
        seen_by_draft = replace(state, front_R=state.front_R + state.drafted_R, cached_R=state.draft_cached_R)
        plan = cached_plan(shape.kind, seen_by_draft, self.draft.role, width=shape.width, active=0)
        return replace(plan, network="draft")

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        assert isinstance(state, SpeculativeState)
        if shape.kind == "draft":
            return Accepted(self._drafted(state, shape, scores.logits_RSV))
        if shape.drawing == "greedy":
            accepted, _ = verify(self, state, shape, scores)
        else:
            accepted = self._verified(state, shape, scores)
        after = accepted.state
        return replace(
            accepted,
            state=replace(
                after,
                drafted_R=torch.zeros_like(after.drafted_R),
                # Of what the draft has cached, this much was computed from tokens that are final.
                draft_cached_R=torch.where(
                    after.done_R, after.draft_cached_R, after.draft_cached_R.minimum(after.cached_R)
                ),
            ),
        )

    def _drafted(self, state: SpeculativeState, shape: Shape, logits_R1V: Tensor) -> SpeculativeState:
        live_R = ~state.done_R
        position_R1 = (state.front_R + state.drafted_R)[:, None]
        # Rows past these are no tokens, and the target may lack them.
        logits_R1V = logits_R1V[..., : self.draft.end_of_tokens]
        token_R1 = logits_R1V.argmax(-1)
        probability_RCV = state.draft_probability_RCV
        if shape.drawing != "greedy":
            tempered_R1V = _tempered(state, shape, logits_R1V)
            keys_R1 = noise_keys(state.settings.seed_R ^ _DRAFT_STREAM, position_R1, state.num_forwards_R)
            token_R1 = torch.where(_sampled(state), gumbel_max(tempered_R1V, keys_R1), token_R1)
            now_RC1 = torch.arange(self.window, device=live_R.device)[:, None] == state.drafted_R[:, None, None]
            probability_RCV = torch.where(now_RC1 & live_R[:, None, None], tempered_R1V.softmax(-1), probability_RCV)
        open_R1 = ~state.final_RL.gather(1, position_R1) & live_R[:, None]
        return replace(
            state,
            tokens_RL=write(state.tokens_RL, position_R1, open_R1, token_R1),
            drafted_R=state.drafted_R + live_R,
            draft_cached_R=torch.where(live_R, position_R1[:, 0], state.draft_cached_R),
            draft_probability_RCV=probability_RCV,
            num_draft_forwards_R=state.num_draft_forwards_R + live_R,
        )

    def _verified(self, state: SpeculativeState, shape: Shape, scores: Scores) -> Accepted[SpeculativeState]:
        positions_RS = scored_positions(state, self.window + 1)
        guesses_RC1 = state.tokens_RL.gather(1, positions_RS[:, :-1])[..., None]
        p_RSV = _tempered(state, shape, scores.logits_RSV).softmax(-1)
        q_RCV = torch.nn.functional.pad(state.draft_probability_RCV, (0, p_RSV.shape[-1] - self.draft.end_of_tokens))
        p_RCV = p_RSV[:, :-1]
        seed_R = state.settings.seed_R
        accept_keys_RC = noise_keys(seed_R ^ _ACCEPT_STREAM, positions_RS[:, :-1], state.num_forwards_R)
        share_RC1 = uniform(accept_keys_RC, 1)
        agreed_RC = (share_RC1 * q_RCV.gather(2, guesses_RC1) <= p_RCV.gather(2, guesses_RC1))[..., 0]
        # Where everything is accepted one more token is drawn from p itself.
        left_RSV = torch.cat([(p_RCV - q_RCV).clamp(min=0), p_RSV[:, -1:]], 1)
        drawn_RS = gumbel_max(left_RSV.log(), noise_keys(seed_R, positions_RS, state.num_forwards_R))
        agreed_RS = torch.nn.functional.pad(agreed_RC, (0, 1))
        guesses_RS = torch.nn.functional.pad(guesses_RC1[..., 0], (0, 1))
        tokens_RS = torch.where(agreed_RS, guesses_RS, drawn_RS)
        # A greedy request of the batch takes the target's best tokens, as if all were greedy.
        best_RS = scores.logits_RSV.argmax(-1)
        tokens_RS = torch.where(_sampled(state), tokens_RS, best_RS)
        agreed_RS = torch.where(_sampled(state), agreed_RS, guesses_RS == best_RS)
        return keep_agreed(accept_agreed(self, state, tokens_RS, agreed_RS, scores))


def _sampled(state: State) -> Tensor:
    """Whether a request samples, [R, 1]."""
    return state.settings.temperature_R[:, None] > 0


def _tempered(state: State, shape: Shape, logits_RSV: Tensor) -> Tensor:
    asked = state.settings
    top = (asked.top_k_R, asked.top_p_R) if shape.drawing == "filtered" else ()
    return tempered(logits_RSV, asked.temperature_R, *top)
