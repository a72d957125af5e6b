"""Who drafts for `speculative`: a causal network token by token, or a block-causal one a whole block in one pass.

Axes: R = requests, C = drafted tokens, S = positions scored (C + 1), V = vocabulary, W = room for pending rows.

A draft network has a cache of its own. Of what it computes, only that from final tokens counts as cached, so every
draft begins with the tokens that became final since the last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from fewstep.decode.causal import accept_agreed, keep_agreed, verify
from fewstep.decode.decoder import Accepted, Decoder, Shape, cached_plan
from fewstep.decode.sampling import gumbel_max, noise_keys, tempered, uniform
from fewstep.decode.state import State, scored_positions, write
from fewstep.decode.steps import draw_tokens
from fewstep.models.network import Network, Plan, Scores
from fewstep.models.roles import INVISIBLE

_DRAFT_STREAM, _ACCEPT_STREAM = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""Change the seed, so that drafting and accepting have noise of their own; the target's draws have the seed itself."""


@dataclass(frozen=True, kw_only=True)
class DraftState(State):
    """The draft's cache holds the positions before `draft_cached_R`."""

    draft_cached_R: Tensor

    def with_cached(self, cached_R: Tensor) -> Self:
        return replace(self, cached_R=cached_R, draft_cached_R=cached_R)

    @property
    def in_all_caches_R(self) -> Tensor:
        return self.cached_R.minimum(self.draft_cached_R)


class Draft(Protocol):
    """Guesses `count` tokens behind the front; `verify` is the rule by which the target's forward accepts them."""

    @property
    def count(self) -> int: ...

    def start(self, state: State) -> DraftState:
        """The state of requests that begin."""

    def shapes(self, width: int) -> Sequence[Shape]:
        """The passes of a draft, whose kind is "draft"; `width`: pending rows of the target."""

    def plan(self, state: DraftState, shape: Shape) -> Plan:
        """What to score in one of them."""

    def accept(self, state: DraftState, shape: Shape, scores: Scores) -> DraftState:
        """The state with what the pass has guessed."""

    def verify(self, decoder: Decoder, state: DraftState, shape: Shape, scores: Scores) -> Accepted[DraftState]:
        """What the target's forward over the guesses makes final."""


@dataclass(frozen=True, kw_only=True)
class BlockDraft:
    """A block-causal network guesses a whole block in one pass, behind the tokens that became final since the last.

    Its masks begin anywhere, not at multiples of the network's block size: they see themselves and everything before
    them, and so do the tokens of the answer that became final together. A guess is drawn with the noise of its position
    and is right if it equals the target's own draw: the text is that of autoregressive decoding, at any temperature.
    The network may be as large as the target, so its passes count as the target's do, in `num_forwards`.
    """

    network: Network
    count: int

    def start(self, state: State) -> DraftState:
        return DraftState(**vars(state), draft_cached_R=torch.zeros_like(state.front_R))

    def shapes(self, width: int) -> Sequence[Shape]:
        return [Shape("draft", max(width, self.count + 1))]

    def plan(self, state: DraftState, shape: Shape) -> Plan:
        role = self.network.role
        assert role.mask_token_id is not None
        seen = replace(state, cached_R=state.draft_cached_R)
        plan = cached_plan(shape.kind, seen, role, width=shape.width, active=self.count)
        is_mask_Q = torch.arange(shape.width + self.count, device=plan.tokens_RQ.device) >= shape.width
        context_length_R1 = state.context_length_R[:, None]
        is_answer_RQ = (plan.positions_RQ >= context_length_R1) & (plan.blocks_RQ != INVISIBLE)
        newly_final_R1 = state.draft_cached_R[:, None].maximum(context_length_R1)
        return replace(
            plan,
            network="draft",
            tokens_RQ=torch.where(is_mask_Q, role.mask_token_id, plan.tokens_RQ),
            blocks_RQ=torch.where(
                is_answer_RQ, torch.where(is_mask_Q, state.front_R[:, None], newly_final_R1), plan.blocks_RQ
            ),
        )

    def accept(self, state: DraftState, shape: Shape, scores: Scores) -> DraftState:
        live_R = ~state.done_R
        positions_RC = scored_positions(state, self.count)
        # Rows past these are no tokens, and the target may lack them.
        logits_RCV = scores.logits_RSV[..., : self.network.end_of_tokens]
        turn_RC = positions_RC - state.context_length_R[:, None] + 1
        guesses_RC = draw_tokens(shape.drawing, state, logits_RCV, positions_RC, turn_RC)
        open_RC = ~state.final_RL.gather(1, positions_RC) & live_R[:, None]
        return replace(
            state,
            tokens_RL=write(state.tokens_RL, positions_RC, open_RC, guesses_RC),
            draft_cached_R=torch.where(live_R, state.front_R, state.draft_cached_R),
            num_forwards_R=state.num_forwards_R + live_R,
        )

    def verify(self, decoder: Decoder, state: DraftState, shape: Shape, scores: Scores) -> Accepted[DraftState]:
        return verify(decoder, state, shape, scores)[0]


@dataclass(frozen=True, kw_only=True)
class SampledDraftState(DraftState):
    """`drafted_R` tokens stand at the front, not verified. `draft_probability_RCV`: what they were drawn from (V = 0 if
    none may be sampled).
    """

    drafted_R: Tensor
    draft_probability_RCV: Tensor


@dataclass(frozen=True, kw_only=True)
class CausalDraft:
    """A small causal network guesses token by token. arXiv 2211.17192 and 2302.01318.

    Greedy, a drafted token is right if it is the target's own. With sampling it is accepted with probability
    min(1, p/q), and the first that is not is replaced by a draw from max(0, p - q), which keeps the target's
    distribution; p and q are the networks' probabilities at the same temperature, top-k and top-p. `sampled`: whether
    requests may sample, for which the state keeps the draft's probabilities of the whole vocabulary.
    """

    network: Network
    count: int
    sampled: bool

    def start(self, state: State) -> SampledDraftState:
        num_requests, num_tokens = len(state.done_R), self.network.end_of_tokens if self.sampled else 0
        return SampledDraftState(
            **vars(state),
            drafted_R=torch.zeros_like(state.front_R),
            draft_cached_R=torch.zeros_like(state.front_R),
            draft_probability_RCV=torch.zeros((num_requests, self.count, num_tokens), dtype=torch.float64),
        )

    def shapes(self, width: int) -> Sequence[Shape]:
        # After a verification the draft has not seen its own last token, nor the target's.
        return [Shape("draft", max(width, 2)), *[Shape("draft", 1)] * (self.count - 1)]

    def plan(self, state: DraftState, shape: Shape) -> Plan:
        assert isinstance(state, SampledDraftState)
        seen_by_draft = replace(state, front_R=state.front_R + state.drafted_R, cached_R=state.draft_cached_R)
        plan = cached_plan(shape.kind, seen_by_draft, self.network.role, width=shape.width, active=0)
        return replace(plan, network="draft")

    def accept(self, state: DraftState, shape: Shape, scores: Scores) -> DraftState:
        assert isinstance(state, SampledDraftState)
        live_R = ~state.done_R
        position_R1 = (state.front_R + state.drafted_R)[:, None]
        # Rows past these are no tokens, and the target may lack them.
        logits_R1V = scores.logits_RSV[..., : self.network.end_of_tokens]
        token_R1 = logits_R1V.argmax(-1)
        probability_RCV = state.draft_probability_RCV
        if shape.drawing != "greedy":
            tempered_R1V = _tempered(state, shape, logits_R1V)
            keys_R1 = noise_keys(state.settings.seed_R ^ _DRAFT_STREAM, position_R1, state.num_forwards_R)
            token_R1 = torch.where(_sampled(state), gumbel_max(tempered_R1V, keys_R1), token_R1)
            now_RC1 = torch.arange(self.count, device=live_R.device)[:, None] == state.drafted_R[:, None, None]
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

    def verify(self, decoder: Decoder, state: DraftState, shape: Shape, scores: Scores) -> Accepted[DraftState]:
        assert isinstance(state, SampledDraftState)
        if shape.drawing == "greedy":
            accepted, _ = verify(decoder, state, shape, scores)
        else:
            accepted = self._weighed(decoder, state, shape, scores)
        after = accepted.state
        # Of what the draft has cached, this much was computed from tokens that are final.
        kept_R = torch.where(after.done_R, after.draft_cached_R, after.draft_cached_R.minimum(after.cached_R))
        after = replace(after, drafted_R=torch.zeros_like(after.drafted_R), draft_cached_R=kept_R)
        return replace(accepted, state=after)

    def _weighed(
        self, decoder: Decoder, state: SampledDraftState, shape: Shape, scores: Scores
    ) -> Accepted[SampledDraftState]:
        positions_RS = scored_positions(state, self.count + 1)
        guesses_RC1 = state.tokens_RL.gather(1, positions_RS[:, :-1])[..., None]
        p_RSV = _tempered(state, shape, scores.logits_RSV).softmax(-1)
        q_RCV = torch.nn.functional.pad(state.draft_probability_RCV, (0, p_RSV.shape[-1] - self.network.end_of_tokens))
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
        return keep_agreed(accept_agreed(decoder, state, tokens_RS, agreed_RS, scores))


def _sampled(state: State) -> Tensor:
    """Whether a request samples, [R, 1]."""
    return state.settings.temperature_R[:, None] > 0


def _tempered(state: State, shape: Shape, logits_RSV: Tensor) -> Tensor:
    asked = state.settings
    top = (asked.top_k_R, asked.top_p_R) if shape.drawing == "filtered" else ()
    return tempered(logits_RSV, asked.temperature_R, *top)
