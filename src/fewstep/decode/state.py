"""The state that every decoder shares, and the one mechanism behind all of them.

Axes: R = requests, L = positions (context, then canvas, then padding), S = positions scored in a step, V = vocabulary,
E = tokens that end an answer.

A request's positions are, from the left: `[0, cached)` final tokens whose keys and values are in the cache; `[cached,
front)` *pending*, final tokens that are not in it yet; `[front, front + block_size)` *active*, the block being
decoded. Every forward of a cached decoder carries a request's pending positions and its active ones. So the first
forward fuses the prefill with a first step, the forward after a finished block fuses its commit with the next block's
first step, and autoregressive decoding is the case whose blocks are single tokens. An uncached decoder forwards
everything and has nothing pending.

Open positions hold what a decoder finds useful: a mask token, or a guess that the next pass verifies.

All fields are tensors of fixed shapes on the device, the requests first; a decoder that remembers more adds its own in
a subclass. A decoder's `plan` and `accept`, and `accept` below, only compute with tensors: nothing in them waits for
the device or reads a value. They leave a request that is done as it is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from torch import Tensor

from fewstep.decode.policies import certainty, perturbed
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.sampling import Sampling, confidence, draw, noise_keys, uniform
from fewstep.models.network import Scores
from fewstep.models.roles import Role

if TYPE_CHECKING:
    from fewstep.decode.decoder import Decoder

NEVER = -1
"""A stop token of a request that does not stop early; the step of a position that is not final yet."""


@dataclass(frozen=True, kw_only=True)
class State:
    """R requests; see the module."""

    tokens_RL: Tensor
    final_RL: Tensor  # context, finalised and padding positions; the others are open
    step_RL: Tensor  # the request's step, from 1, that finalised the position; 0 = given, NEVER = open
    confidence_RL: Tensor  # untempered probability of the token when it was finalised; 1 = given
    context_length_R: Tensor
    end_R: Tensor  # the request is done when every position before this one is final
    stop_tokens_RE: Tensor  # ... or one of these tokens and every position before it; NEVER = none
    barred_RE: Tensor  # tokens that no position takes which something given follows; NEVER = none
    canvas_end_R: Tensor
    front_R: Tensor
    cached_R: Tensor
    done_R: Tensor
    num_forwards_R: Tensor  # also the number of the request's last step
    num_draft_forwards_R: Tensor
    block_step_R: Tensor  # steps spent in the current block
    block_index_R: Tensor  # blocks finished before the current one
    num_blocks_R: Tensor  # blocks with open positions, in all
    num_steps_R: Tensor  # steps over the canvas, for paced policies
    seed_R: Tensor
    setting_R: Tensor  # the policy's number
    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor

    @property
    def pending_R(self) -> Tensor:
        """Number of pending positions; -1 for a request that is done."""
        return torch.where(self.done_R, -1, self.front_R - self.cached_R)

    def select(self, requests_r: Tensor) -> Self:
        """These requests alone, copied."""
        return self._map(lambda field: field.index_select(0, requests_r))

    def put(self, requests_r: Tensor, other: "State") -> None:
        """Write the requests of `other` into these rows, in place."""
        for field in fields(self):
            getattr(self, field.name).index_copy_(0, requests_r, getattr(other, field.name))

    def to(self, device: torch.device) -> Self:
        return self._map(lambda field: field.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


StateT = TypeVar("StateT", bound=State)


def begin(
    decoder: "Decoder",
    requests: Sequence[Request],
    canvases: Sequence[Canvas],
    length: int,
    *,
    pad_token_id: int,
    stop_token_ids: Sequence[int],
) -> State:
    """The state, on the CPU, of requests before their first step. Each must fit in `length` positions."""
    R = len(requests)
    tokens_RL = torch.full((R, length), pad_token_id)
    final_RL = torch.ones((R, length), dtype=torch.bool)
    for r, (request, canvas) in enumerate(zip(requests, canvases, strict=True)):
        start, end = len(request.prompt_ids), len(request.prompt_ids) + len(canvas.tokens)
        tokens_RL[r, :end] = torch.tensor([*request.prompt_ids, *canvas.tokens])
        final_RL[r, start:end] = ~torch.tensor(canvas.open)

    def integers(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long)

    def ends(applies: Iterable[bool]) -> Tensor:
        rows = [stop_token_ids if applied else [NEVER] * len(stop_token_ids) for applied in applies]
        return torch.tensor(rows, dtype=torch.long).view(R, len(stop_token_ids))

    context_length_R = integers(len(request.prompt_ids) for request in requests)
    zeros_R = torch.zeros(R, dtype=torch.long)
    sampling = decoder.sampling
    state = State(
        tokens_RL=tokens_RL,
        final_RL=final_RL,
        step_RL=torch.where(final_RL, 0, NEVER),
        confidence_RL=final_RL.float(),
        context_length_R=context_length_R,
        end_R=context_length_R + integers(canvas.limit for canvas in canvases),
        stop_tokens_RE=ends(canvas.stops_early for canvas in canvases),
        barred_RE=ends(request.canvas is not None for request in requests),
        canvas_end_R=context_length_R + integers(len(canvas.tokens) for canvas in canvases),
        front_R=zeros_R,
        cached_R=zeros_R,
        done_R=torch.zeros(R, dtype=torch.bool),
        num_forwards_R=zeros_R,
        num_draft_forwards_R=zeros_R,
        block_step_R=zeros_R,
        block_index_R=zeros_R,
        num_blocks_R=integers(canvas.num_blocks for canvas in canvases),
        num_steps_R=integers(canvas.num_steps for canvas in canvases),
        seed_R=integers(request.seed for request in requests),
        setting_R=torch.full((R,), float(decoder.policy.setting)),
        temperature_R=torch.full((R,), float(sampling.temperature)),
        top_k_R=torch.full((R,), sampling.top_k or torch.iinfo(torch.long).max),
        top_p_R=torch.full((R,), 1.0 if sampling.top_p is None else float(sampling.top_p)),
    )
    front_R = _block_start(first_open(state), state.context_length_R, decoder.role, decoder.block_size)
    return decoder.start(replace(state, front_R=front_R, cached_R=zeros_R if decoder.cached else front_R))


def free_slots(like: State, num_requests: int, device: torch.device) -> State:
    """A state of `num_requests` rows as long as those of `like`, all done and nothing open in them."""
    state = like._map(lambda field: field.new_zeros((num_requests, *field.shape[1:]), device=device))
    return replace(state, done_R=torch.ones_like(state.done_R), final_RL=torch.ones_like(state.final_RL))


def first_open(state: State) -> Tensor:
    """First position that is not final, L where all are, [R]."""
    length = state.tokens_RL.shape[1]
    return torch.where(state.final_RL, length, torch.arange(length, device=state.tokens_RL.device)).amin(1)


def scored_positions(state: State, count: int) -> Tensor:
    """The `count` positions from the front on, [R, S]."""
    return state.front_R[:, None] + torch.arange(count, device=state.front_R.device)


def is_stop(state: State, tokens_RS: Tensor) -> Tensor:
    """Whether each token ends its request, [R, S]."""
    return (tokens_RS[..., None] == state.stop_tokens_RE[:, None]).any(-1)


def draw_tokens(sampling: Sampling, state: State, logits_RSV: Tensor, positions_RS: Tensor, step: Tensor) -> Tensor:
    """Tokens [R, S] as the sampling says, with the noise of these positions and steps ([R] or [R, S])."""
    if sampling.greedy:
        return logits_RSV.argmax(-1)
    top = (state.top_k_R, state.top_p_R) if sampling.filtered else ()
    return draw(logits_RSV, noise_keys(state.seed_R, positions_RS, step), state.temperature_R, *top)


def accept(decoder: "Decoder", state: StateT, scores: Scores) -> StateT:
    """The state after a step: tokens are drawn for S positions from the front on, and the policy's choice is final."""
    logits_RSV = scores.logits_RSV
    positions_RS = scored_positions(state, logits_RSV.shape[1])
    live_R = ~state.done_R
    step_R = state.num_forwards_R + live_R
    masked_RS = ~state.final_RL.gather(1, positions_RS) & live_R[:, None]

    policy = decoder.policy
    tokens_RS = draw_tokens(decoder.sampling, state, logits_RSV, positions_RS, step_R)
    confidence_RS = confidence(logits_RSV, tokens_RS)

    def order_noise() -> Tensor:
        # Another stream than the tokens', which have the seed itself.
        return uniform(noise_keys(~state.seed_R, positions_RS, step_R), 1)[..., 0]

    certainty_RS = certainty(policy.order, logits_RSV, confidence_RS, order_noise)
    certainty_RS = perturbed(certainty_RS, policy.temperature, order_noise)
    if scores.settled_RS is not None:
        # Waiting cannot change these, and their neighbours are better drawn knowing them.
        certainty_RS = certainty_RS.masked_fill(scores.settled_RS, torch.inf)
    setting_R = _steps_left(state) if policy.paced else state.setting_R
    chosen_RS = policy(certainty_RS, masked_RS, setting_R[:, None])
    return finalise(decoder, state, tokens_RS, chosen_RS, confidence_RS)


def finalise(decoder: "Decoder", state: StateT, tokens_RS: Tensor, chosen_RS: Tensor, confidence_RS: Tensor) -> StateT:
    """The state after a step that makes the chosen tokens, of the S positions from the front on, final.

    What was pending is in the cache now. Chosen are open positions of live requests only.
    """
    positions_RS = scored_positions(state, tokens_RS.shape[1])
    step_R = state.num_forwards_R + ~state.done_R
    return _advance(
        decoder,
        replace(
            state,
            tokens_RL=write(state.tokens_RL, positions_RS, chosen_RS, tokens_RS),
            final_RL=write(state.final_RL, positions_RS, chosen_RS, chosen_RS),
            step_RL=write(state.step_RL, positions_RS, chosen_RS, step_R[:, None]),
            confidence_RL=write(state.confidence_RL, positions_RS, chosen_RS, confidence_RS),
            num_forwards_R=step_R,
        ),
    )


def _advance(decoder: "Decoder", state: StateT) -> StateT:
    """Stop requests that are finished; move the others to the block of their first open position."""
    first_open_R = first_open(state)
    position_L = torch.arange(state.tokens_RL.shape[1], device=state.tokens_RL.device)
    stops_RL = state.final_RL & is_stop(state, state.tokens_RL)
    stops_RL &= position_L >= state.context_length_R[:, None]
    stopped_R = (stops_RL & (position_L < first_open_R[:, None])).any(1)
    done_R = state.done_R | stopped_R | (first_open_R >= state.end_R)

    front_R = _block_start(first_open_R, state.context_length_R, decoder.role, decoder.block_size)
    front_R = torch.where(done_R, state.front_R, front_R)
    moved_R = front_R != state.front_R
    return replace(
        state,
        done_R=done_R,
        front_R=front_R,
        cached_R=torch.where(state.done_R, state.cached_R, state.front_R) if decoder.cached else front_R,
        block_step_R=torch.where(moved_R, 0, state.block_step_R + ~state.done_R),
        block_index_R=state.block_index_R + moved_R,
    )


def _block_start(position_R: Tensor, context_length_R: Tensor, role: Role, block_size: int) -> Tensor:
    first_R = role.first_block_start(context_length_R)
    return position_R - (position_R - first_R) % block_size


def _steps_left(state: State) -> Tensor:
    """Steps left in the current block, this one included: the total split evenly, the remainder to the first blocks."""
    num_blocks_R = state.num_blocks_R.clamp(min=1)  # a free slot has none
    each_R = state.num_steps_R // num_blocks_R
    has_one_more_R = state.block_index_R < state.num_steps_R % num_blocks_R
    return (each_R + has_one_more_R - state.block_step_R).clamp(min=1)


def write(field_RL: Tensor, positions_RS: Tensor, chosen_RS: Tensor, values_RS: Tensor) -> Tensor:
    """`field_RL` with the chosen positions, each named once, set to the values."""
    return field_RL.scatter(1, positions_RS, torch.where(chosen_RS, values_RS, field_RL.gather(1, positions_RS)))
