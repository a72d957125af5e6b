"""What every decoder does with a state: begin requests, draw tokens, make chosen ones final, and move on.

Axes: as in `state`.

A decoder's `plan` and `accept`, and all below but `begin`, only compute with tensors: nothing in them waits for the
device or reads a value. They leave a request that is done as it is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.decode.decoder import Accepted, Decoder, Drawing, Shape
from fewstep.decode.own_policies import PassFacts, PreviousPass, as_policy, reads, same_kind
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.sampling import confidence, draw, noise_keys, uniform
from fewstep.decode.state import (
    NEVER,
    Previous,
    Settings,
    State,
    StateT,
    first_open,
    is_stop,
    scored_positions,
    write,
)
from fewstep.errors import FewstepError
from fewstep.models.network import Scores
from fewstep.models.roles import Role


def begin(
    decoder: Decoder,
    requests: Sequence[Request],
    canvases: Sequence[Canvas],
    length: int,
    *,
    pad_token_id: int,
    num_stop_tokens: int,
) -> State:
    """The state, on the CPU, of requests before their first step. Each must fit in `length` positions, and have set its
    stop tokens, at most `num_stop_tokens`.
    """
    R = len(requests)
    tokens_RL = torch.full((R, length), pad_token_id)
    final_RL = torch.ones((R, length), dtype=torch.bool)
    for r, (request, canvas) in enumerate(zip(requests, canvases, strict=True)):
        start, end = len(request.prompt_ids), len(request.prompt_ids) + len(canvas.tokens)
        tokens_RL[r, :end] = torch.tensor([*request.prompt_ids, *canvas.tokens])
        final_RL[r, start:end] = ~torch.tensor(canvas.open)

    context_length_R = integers(len(request.prompt_ids) for request in requests)
    zeros_R = torch.zeros(R, dtype=torch.long)
    state = State(
        tokens_RL=tokens_RL,
        final_RL=final_RL,
        step_RL=torch.where(final_RL, 0, NEVER),
        confidence_RL=final_RL.float(),
        context_length_R=context_length_R,
        decode_end_R=context_length_R + integers(canvas.decode_length for canvas in canvases),
        canvas_end_R=context_length_R + integers(len(canvas.tokens) for canvas in canvases),
        front_R=zeros_R,
        cached_R=zeros_R,
        done_R=torch.zeros(R, dtype=torch.bool),
        num_forwards_R=zeros_R,
        num_draft_forwards_R=zeros_R,
        settings=_settings(decoder, requests, canvases, num_stop_tokens),
        previous=_nothing_yet(tokens_RL) if "previous" in reads(decoder.policy).values() else None,
    )
    front_R = _block_start(first_open(state), state.context_length_R, decoder.role, decoder.block_size)
    state = replace(state, front_R=front_R, cached_R=zeros_R if decoder.traits.cached else front_R)
    return decoder.start(state, requests, canvases)


def _nothing_yet(tokens_RL: Tensor) -> Previous:
    shape = tokens_RL.shape
    return Previous(last_tokens_RL=torch.full(shape, NEVER), last_confidence_RL=torch.zeros(shape))


def integers(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)


def padded_tokens(rows: Iterable[Sequence[int]], count: int) -> Tensor:
    """[R, E], NEVER where a row has fewer than `count`."""
    return torch.tensor([[*row, *[NEVER] * (count - len(row))] for row in rows], dtype=torch.long).view(-1, count)


def _settings(
    decoder: Decoder, requests: Sequence[Request], canvases: Sequence[Canvas], num_stop_tokens: int
) -> Settings:
    stops = [
        (request.stop_token_ids or ()) if canvas.stops_early else ()
        for request, canvas in zip(requests, canvases, strict=True)
    ]
    R = len(requests)
    policies = [decoder.policy if request.policy is None else as_policy(request.policy) for request in requests]
    numbers = [policy.numbers for policy in policies]
    sampling = [request.sampling for request in requests]
    return Settings(
        stop_tokens_RE=padded_tokens(stops, num_stop_tokens),
        seed_R=integers(request.seed for request in requests),
        policy_RN=torch.tensor(numbers, dtype=torch.float32).view(R, len(decoder.policy.numbers)),
        temperature_R=torch.tensor([float(one.temperature) for one in sampling]),
        top_k_R=integers(one.top_k or torch.iinfo(torch.long).max for one in sampling),
        top_p_R=torch.tensor([1.0 if one.top_p is None else float(one.top_p) for one in sampling]),
    )


def free_slots(like: StateT, num_requests: int, device: torch.device) -> StateT:
    """A state of `num_requests` rows as long as those of `like`, all done and nothing open in them."""
    state = like.map(lambda field: field.new_zeros((num_requests, *field.shape[1:]), device=device))
    return replace(state, done_R=torch.ones_like(state.done_R), final_RL=torch.ones_like(state.final_RL))


def check_settings(decoder: Decoder, request: Request) -> None:
    """FewstepError if the request asks for what this decoder does not do."""
    if decoder.traits.greedy_only and not request.sampling.greedy:
        raise FewstepError(
            f"the {decoder.name} decoder is greedy only; leave out the temperature, or sample with the decoder "
            "autoregressive, prompt-lookup or speculative"
        )
    if request.policy is not None and not same_kind(as_policy(request.policy), decoder.policy):
        raise FewstepError(
            f"requests of one batch share a kind of policy, which is {decoder.policy!r} here; got {request.policy!r}"
        )


def draw_tokens(drawing: Drawing, state: State, logits_RSV: Tensor, positions_RS: Tensor, step: Tensor) -> Tensor:
    """Tokens [R, S] as each request asks, with the noise of these positions and steps ([R] or [R, S])."""
    if drawing == "greedy":
        return logits_RSV.argmax(-1)
    asked = state.settings
    top = (asked.top_k_R, asked.top_p_R) if drawing == "filtered" else ()
    return draw(logits_RSV, noise_keys(asked.seed_R, positions_RS, step), asked.temperature_R, *top)


def accept(
    decoder: Decoder, state: StateT, shape: Shape, scores: Scores, numbers_RN: Tensor | None = None
) -> Accepted[StateT]:
    """After a step: tokens are drawn for S positions from the front on, and the policy's choice is final.

    `numbers_RN`: numbers for the policy, instead of the requests' own.
    """
    logits_RSV = scores.logits_RSV
    positions_RS = scored_positions(state, logits_RSV.shape[1])
    live_R = ~state.done_R
    step_R = state.num_forwards_R + live_R
    masked_RS = ~state.final_RL.gather(1, positions_RS) & live_R[:, None]

    policy = decoder.policy
    tokens_RS = draw_tokens(shape.drawing, state, logits_RSV, positions_RS, step_R)
    confidence_RS = confidence(logits_RSV, tokens_RS)

    def order_noise() -> Tensor:
        # Another stream than the tokens', which have the seed itself.
        return uniform(noise_keys(~state.settings.seed_R, positions_RS, step_R), 1)[..., 0]

    previous = state.previous
    facts = PassFacts(
        policy=policy,
        masked=masked_RS,
        tokens=tokens_RS,
        confidence=confidence_RS,
        logits=logits_RSV,
        numbers=state.settings.policy_RN if numbers_RN is None else numbers_RN,
        previous=None if previous is None else PreviousPass.at(positions_RS, previous),
        settled=scores.settled_RS,
        noise=order_noise,
    )
    accepted = finalise(decoder, state, tokens_RS, facts.chosen, confidence_RS)
    if previous is None:
        return accepted
    drawn = Previous(
        last_tokens_RL=write(previous.last_tokens_RL, positions_RS, live_R[:, None], tokens_RS),
        last_confidence_RL=write(previous.last_confidence_RL, positions_RS, live_R[:, None], confidence_RS),
    )
    return replace(accepted, state=replace(accepted.state, previous=drawn))


def finalise(
    decoder: Decoder, state: StateT, tokens_RS: Tensor, chosen_RS: Tensor, confidence_RS: Tensor
) -> Accepted[StateT]:
    """After a step that makes the chosen tokens, of the S positions from the front on, final.

    What was pending is in the cache now. Only open positions of live requests may be chosen.
    """
    positions_RS = scored_positions(state, tokens_RS.shape[1])
    step_R = state.num_forwards_R + ~state.done_R
    after = replace(
        state,
        tokens_RL=write(state.tokens_RL, positions_RS, chosen_RS, tokens_RS),
        final_RL=write(state.final_RL, positions_RS, chosen_RS, chosen_RS),
        step_RL=write(state.step_RL, positions_RS, chosen_RS, step_R[:, None]),
        confidence_RL=write(state.confidence_RL, positions_RS, chosen_RS, confidence_RS),
        num_forwards_R=step_R,
    )
    return Accepted(_advance(decoder, after), positions_RS, chosen_RS)


def _advance(decoder: Decoder, state: StateT) -> StateT:
    """Stop requests that are finished; move the others to the block of their first open position."""
    first_open_R = first_open(state)
    position_L = torch.arange(state.tokens_RL.shape[1], device=state.tokens_RL.device)
    stops_RL = state.final_RL & is_stop(state, state.tokens_RL)
    stops_RL &= position_L >= state.context_length_R[:, None]
    stopped_R = (stops_RL & (position_L < first_open_R[:, None])).any(1)
    done_R = state.done_R | stopped_R | (first_open_R >= state.decode_end_R)

    front_R = _block_start(first_open_R, state.context_length_R, decoder.role, decoder.block_size)
    front_R = torch.where(done_R, state.front_R, front_R)
    cached_R = torch.where(state.done_R, state.cached_R, state.front_R) if decoder.traits.cached else front_R
    return replace(state, done_R=done_R, front_R=front_R, cached_R=cached_R)


def _block_start(position_R: Tensor, context_length_R: Tensor, role: Role, block_size: int) -> Tensor:
    first_R = role.first_block_start(context_length_R)
    return position_R - (position_R - first_R) % block_size


class Finalising:
    """What decoders share that finalise tokens they have just drawn, and so remember nothing but the State."""

    def start(self, state: State, requests: Sequence[Request], canvases: Sequence[Canvas]) -> State:
        return state

    def accept(self: Decoder, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        return accept(self, state, shape, scores)
