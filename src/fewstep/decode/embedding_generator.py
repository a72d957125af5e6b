"""The generator that runs the samplers of embedding space, and which requests it can answer.

It stands beside the loop: tokens change until the last pass, so that nothing here is a `Decoder`.

Axes: R = requests of a pass, P = positions of prompts, G = positions of canvases, Q = rows of a forward, C = copies of
a request (with its prompt, and without), V = vocabulary, D = hidden width, N = steps.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.decode.admission import check_free
from fewstep.decode.decoder import whole_blocks
from fewstep.decode.embedding import CHURN, SAMPLERS, EmbeddingSampling, Rows, check_draws_nothing, grid, step_size
from fewstep.decode.generator import given_up
from fewstep.decode.loop import CACHE_LENGTH_BUCKET
from fewstep.decode.requests import Event, FinishReason, Output, Request
from fewstep.decode.sampling import noise_keys, uniform
from fewstep.errors import FewstepError
from fewstep.models.cache import bytes_per_position
from fewstep.models.network import Network
from fewstep.models.noise_conditioning import NoisyRows, conditioning_of
from fewstep.models.roles import INVISIBLE
from fewstep.models.threads import sparing_threads


@dataclass
class _Ticket:
    """A request under way, or queued. `x_GD`: its rows; `tokens_G`: its present tokens, the given ones among them."""

    number: int
    request: Request
    canvas: list[int]
    open_G: Tensor
    submitted_s: float
    x_GD: Tensor
    temperature: float
    given_GD: Tensor
    tokens_G: Tensor
    confidence_G: Tensor
    before_CD: Tensor | None = None
    guess_GD: Tensor | None = None
    step: int = 0
    events: list[Event] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)


class EmbeddingSampler:
    """Answers requests from noise, in slots that are refilled; see `Generator`. Each round is one pass for every
    request under way, whichever step it is at. The first pass of a request also carries its prompt, whose keys and
    values stay in the cache.

    `length`: the most positions that a request needs. `listeners` are called after each round, `on_begin` before one in
    which requests begin. `fixed_temperature`: of all requests; None: each its own.
    """

    def __init__(
        self,
        network: Network,
        settings: EmbeddingSampling,
        *,
        num_slots: int,
        length: int,
        fixed_temperature: float | None = None,
    ) -> None:
        if num_slots < 1:
            raise FewstepError(f"batch_size must be at least 1, got {num_slots}")
        space = network.role.embedding_space
        assert space is not None
        self.network, self.space = network, space
        self.settings = settings = settings.for_role(network.role)
        assert settings.steps is not None
        assert settings.sampler is not None
        self.num_slots = num_slots
        self.fixed_temperature = fixed_temperature
        self.length = whole_blocks(length + 1, CACHE_LENGTH_BUCKET) - 1
        self._copies = 2 if settings.guidance else 1  # of a request: with its prompt, and without
        self._cache = network.new_cache(num_slots * self._copies, self.length)
        level_N, time_N = grid(settings.grid, space, settings.steps)
        self._levels, self._step_sizes = (
            level_N.tolist(),
            step_size(settings.sampler, space, time_N[:-1], time_N[1:]).tolist(),
        )
        self._part = conditioning_of(network.module)
        self._table_VD = network.module.get_input_embeddings().weight
        self._unit_VD = self._part.unit(self._table_VD)
        self._queue: deque[_Ticket] = deque()
        self._live: dict[int, _Ticket] = {}
        self._free = list(range(num_slots))[::-1]
        self._num_submitted = 0
        self._seen: list[_Ticket] = []
        self.listeners: list[Callable[[EmbeddingSampler], None]] = []
        self.on_begin: Callable[[EmbeddingSampler], None] | None = None

    @property
    def steps(self) -> int:
        return len(self._step_sizes)

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._live)

    def fits(self, network: Network, settings: EmbeddingSampling, *, num_slots: int, length: int) -> bool:
        """Whether this one is idle and can stand for a new one of these."""
        same = (self.network, self.settings, self.num_slots) == (network, settings.for_role(network.role), num_slots)
        fits = length <= self.length < 2 * length + CACHE_LENGTH_BUCKET
        at_place = (self._unit_VD.device, self._cache.keys.dtype) == (network.device, network.attention_dtype)
        if not (same and fits and at_place and not self.busy):
            return False
        self._table_VD = network.module.get_input_embeddings().weight  # training may have moved it since
        self._unit_VD = self._part.unit(self._table_VD)
        return True

    @torch.inference_mode()
    def submit(self, request: Request) -> int:
        """Queue a request. FewstepError if it cannot be answered."""
        canvas, is_open = check_embedding_request(self.network, self.settings, request)
        if positions_for(self.settings, request) > self.length:
            raise FewstepError(f"the request needs more than the {self.length} positions that a slot has")
        device = self.network.device
        temperature = self.fixed_temperature
        temperature = request.sampling.temperature if temperature is None else temperature
        open_G = torch.tensor(is_open, device=device)
        ids_G = torch.tensor(canvas, device=device)
        given_GD = torch.where(open_G[:, None], 0.0, self._unit_VD[ids_G])
        self._num_submitted += 1
        ticket = _Ticket(
            number=self._num_submitted - 1,
            request=request,
            canvas=canvas,
            open_G=open_G,
            submitted_s=time.perf_counter(),
            x_GD=given_GD,
            temperature=temperature,
            given_GD=given_GD,
            tokens_G=ids_G,
            confidence_G=torch.ones(len(canvas), device=device),
        )
        ticket.x_GD = torch.where(open_G[:, None], self.space.noise_scale * self._noise(ticket, 0), given_GD)
        self._queue.append(ticket)
        return ticket.number

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Output]]:
        """One pass for every request under way, and of those that begin; returns those that it completed."""
        joining = {}
        while self._queue and self._free:
            slot = self._free.pop()
            joining[slot] = self._live[slot] = self._queue.popleft()
        if joining and self.on_begin is not None:
            self.on_begin(self)
        going_on = {slot: ticket for slot, ticket in self._live.items() if slot not in joining}
        num_requests = len(self._live)
        with sparing_threads(self.network.device, self.network.num_parameters, num_requests):
            for tickets in (joining, going_on):
                if tickets:
                    self._pass(tickets, first=tickets is joining)
        self._seen = list(self._live.values())
        completed = []
        for slot, ticket in list(self._live.items()):
            if ticket.step == self.steps:
                del self._live[slot]
                self._free.append(slot)
                completed.append((ticket.number, self._output(ticket, done=True)))
        for listener in self.listeners:
            listener(self)
        return completed

    def events(self) -> list[tuple[int, Event]]:
        """The tokens of the requests that the last round completed, since none is final before."""
        return [(ticket.number, event) for ticket in self._seen for event in ticket.events]

    def provisional(self) -> list[tuple[int, list[Event]]]:
        """The present tokens of the open positions of the requests under way, up to an end-of-text: they may change."""
        return [(ticket.number, self._events(ticket, final=False)) for ticket in self._live.values()]

    def rows(self) -> list[tuple[int, int, Tensor]]:
        """Number, steps taken and noisy rows [G, D] of each request under way, for who records paths."""
        return [(ticket.number, ticket.step, ticket.x_GD) for ticket in self._live.values()]

    def cancel(self, number: int) -> Output | None:
        """Give a request up; see `Generator`."""
        slot = given_up(number, self._queue, self._live)
        if slot is None:
            return None
        self._free.append(slot)
        return self._output(self._live.pop(slot), done=False)

    # A pass

    def _pass(self, tickets: Mapping[int, _Ticket], *, first: bool) -> None:
        """One forward for these requests, then a step of the sampler for each."""
        found = list(tickets.values())
        logits_RGV, clean_RGD = self._predict(list(tickets), found, first=first)
        tokens_RG = logits_RGV.argmax(-1)
        confidence_RG = (logits_RGV.amax(-1) - logits_RGV.logsumexp(-1)).exp()
        for row, ticket in enumerate(found):
            length = len(ticket.canvas)
            ticket.tokens_G = torch.where(ticket.open_G, tokens_RG[row, :length], ticket.tokens_G)
            ticket.confidence_G = torch.where(ticket.open_G, confidence_RG[row, :length], 1.0)
            self._advance(ticket, clean_RGD[row, :length])
            if ticket.step == self.steps:
                ticket.events = self._events(ticket, final=True)

    def _advance(self, ticket: _Ticket, clean_GD: Tensor) -> None:
        assert self.settings.sampler is not None
        level, then = self._levels[ticket.step : ticket.step + 2]
        ticket.step += 1
        if then == 0:
            return
        draws = self.settings.sampler in ("stochastic", "consistency")
        rows = Rows(
            ticket.x_GD,
            torch.full_like(clean_GD[:, :1], level),
            torch.full_like(clean_GD[:, :1], then),
            clean_GD,
            self._noise(ticket, ticket.step) if draws else torch.zeros_like(clean_GD),
        )
        churn = CHURN if self.settings.churn is None else self.settings.churn
        x_GD = SAMPLERS[self.settings.sampler](rows, self.space.noise_scale, churn)
        ticket.x_GD = torch.where(ticket.open_G[:, None], x_GD, ticket.given_GD)

    def _noise(self, ticket: _Ticket, step: int) -> Tensor:
        """Standard normal numbers times the temperature, [G, D]: a function of (seed, position, step)."""
        return ticket.temperature * normal_noise(
            ticket.request.seed, step, len(ticket.canvas), self._unit_VD.shape[1], self._unit_VD.device
        )

    def _predict(self, slots: Sequence[int], tickets: Sequence[_Ticket], *, first: bool) -> tuple[Tensor, Tensor]:
        """Logits [R, G, V] of all canvases, and the embeddings [R, G, D] of what is predicted."""
        network, module, device = self.network, self.network.module, self.network.device
        copies, num = self._copies, len(tickets)
        prompts = [ticket.request.prompt_ids for ticket in tickets]
        num_P = max(map(len, prompts)) if first else 0
        num_G = max(len(ticket.canvas) for ticket in tickets)
        context_R1 = torch.tensor([[len(ids)] for ids in prompts])
        # Rows of the prompt from the left, then those of the canvas; what is no real row goes to the scratch slot.
        index_1P, index_1G = torch.arange(num_P)[None], torch.arange(num_G)[None]
        length_R1 = torch.tensor([[len(ticket.canvas)] for ticket in tickets])
        real_RQ = torch.cat([index_1P < context_R1, index_1G < length_R1], 1)
        positions_RQ = torch.cat([index_1P.expand(num, -1), context_R1 + index_1G], 1)
        blocks_RQ = torch.where(real_RQ, network.role.blocks(positions_RQ, context_R1), INVISIBLE)
        places_RQ = torch.where(real_RQ, positions_RQ, self._cache.scratch)
        positions_RQ = torch.where(real_RQ, positions_RQ, 0)
        positions_RQ, blocks_RQ, places_RQ = (
            each.repeat(copies, 1).to(device) for each in (positions_RQ, blocks_RQ, places_RQ)
        )
        slots_R = torch.tensor(
            [slot + copy * self.num_slots for copy in range(copies) for slot in slots], device=device
        )
        if first:
            new_R = torch.zeros(self._cache.all_blocks.shape[0], dtype=torch.bool, device=device)
            self._cache.reset(new_R.index_fill(0, slots_R, True))
        furthest = max(len(ids) + len(ticket.canvas) for ids, ticket in zip(prompts, tickets, strict=True))
        is_all = slots_R.tolist() == list(range(len(self._cache.all_blocks)))
        cache = self._cache.view(
            None if is_all else slots_R,
            min(whole_blocks(furthest + 1, CACHE_LENGTH_BUCKET), self.length + 1),
        )
        cache.place(places_RQ, blocks_RQ)
        embedded_RQD = self._embedded(tickets, prompts, num_P, num_G)
        hidden_RQD = network.hidden_of(embedded_RQD, positions_RQ, blocks_RQ, cache)
        own_RGD = hidden_RQD[:, num_P:]
        if first:
            last_R = (context_R1[:, 0] - 1).repeat(copies).to(device)
            last_RD = hidden_RQD[torch.arange(len(last_R), device=device), last_R]
            for row, ticket in enumerate(tickets):
                ticket.before_CD = last_RD[row::num]
        before_RD = torch.cat([_known(ticket.before_CD)[copy, None] for copy in range(copies) for ticket in tickets])
        before_RGD = torch.cat([before_RD[:, None], own_RGD[:, :-1]], 1)
        read_RGD = self._part.read(own_RGD, before_RGD)
        logits_RGV, clean_RGD = self._part.scores(module, read_RGD, self._unit_VD)
        logits_RGV = self._part.without_ruled_out(logits_RGV)
        if copies == 2:
            scale = 1 + self.settings.guidance
            with_RGV, without_RGV = logits_RGV.chunk(2)
            logits_RGV = self._part.without_ruled_out(without_RGV + scale * (with_RGV - without_RGV))
            if clean_RGD is not None:
                with_RGD, without_RGD = clean_RGD.chunk(2)
                clean_RGD = without_RGD + scale * (with_RGD - without_RGD)
        if clean_RGD is None:
            clean_RGD = logits_RGV.softmax(-1) @ self._unit_VD
        if self._part.guess is not None:
            for row, ticket in enumerate(tickets):
                ticket.guess_GD = clean_RGD[row, : len(ticket.canvas)]
        return logits_RGV, clean_RGD

    def _embedded(self, tickets: Sequence[_Ticket], prompts: Sequence[list[int]], num_P: int, num_G: int) -> Tensor:
        """What the rows of a pass enter the network as, [R, Q, D]; without its prompt a request has mask tokens."""
        device, width = self.network.device, self._unit_VD.shape[1]
        num, copies = len(tickets), self._copies
        x_RGD = torch.zeros((num, num_G, width), device=device)
        level_RG, step_RG = (torch.zeros((num, num_G), device=device) for _ in range(2))
        guess_RGD = None if self._part.guess is None else torch.zeros((num, num_G, width), device=device)
        for row, ticket in enumerate(tickets):
            length = len(ticket.canvas)
            x_RGD[row, :length] = ticket.x_GD
            level_RG[row, :length] = torch.where(ticket.open_G, self._levels[ticket.step], 0.0)
            step_RG[row] = self._step_sizes[ticket.step]
            if guess_RGD is not None and ticket.guess_GD is not None:
                guess_RGD[row, :length] = ticket.guess_GD
        flat = torch.arange(num * num_G, device=device)
        noisy = NoisyRows(
            flat,
            flat,
            x_RGD.flatten(0, 1),
            level_RG.flatten(),
            step_RG.flatten(),
            None if guess_RGD is None else guess_RGD.flatten(0, 1),
        )
        rows_RGD = self._part.rows(noisy, self.space, self._table_VD, self._unit_VD).view(num, num_G, width)
        rows_RGD = rows_RGD.to(self._table_VD.dtype).repeat(copies, 1, 1)
        if not num_P:
            return rows_RGD
        pad = self.network.pad_token_id
        ids = [[*one, *[pad] * (num_P - len(one))] for one in prompts]
        if copies == 2:
            ids += [[self._part.mask_token_id] * num_P] * num
        return torch.cat([self.network.module.get_input_embeddings()(torch.tensor(ids, device=device)), rows_RGD], 1)

    # Outputs

    def _events(self, ticket: _Ticket, *, final: bool) -> list[Event]:
        tokens, opened = ticket.tokens_G.tolist(), ticket.open_G.tolist()
        confidence, ends = ticket.confidence_G.tolist(), set(self._stops(ticket.request))
        limit = len(tokens) if ticket.request.canvas is not None else ticket.request.max_new_tokens
        events = []
        for position in range(min(limit, len(tokens))):
            if opened[position]:
                events.append(Event(position, tokens[position], ticket.step, confidence[position], final=final))
            if tokens[position] in ends and ticket.request.canvas is None:
                break
        return events

    def _stops(self, request: Request) -> tuple[int, ...]:
        return self.network.stop_token_ids if request.stop_token_ids is None else request.stop_token_ids

    def _output(self, ticket: _Ticket, *, done: bool) -> Output:
        request, opened = ticket.request, ticket.open_G.tolist()
        infilled = request.canvas is not None
        limit = len(ticket.canvas) if infilled else min(request.max_new_tokens, len(ticket.canvas))
        num_final = limit if done else opened.index(True)
        token_ids: list[int] = ticket.tokens_G.tolist()[:num_final]
        reason: FinishReason = "length" if done else "cancelled"
        if not infilled:
            ends = [i for i, one in enumerate(token_ids) if one in self._stops(request)]
            if ends:
                token_ids, reason = token_ids[: ends[0] + 1], "stop"
        step_G = torch.where(ticket.open_G, ticket.step if done else -1, 0)
        return Output(
            token_ids=token_ids,
            num_tokens=sum(opened[:num_final]) if infilled else len(token_ids),
            num_forwards=ticket.step,
            seconds=time.perf_counter() - ticket.submitted_s,
            finish_reason=reason,
            canvas_ids_G=ticket.tokens_G.cpu().clone(),
            step_G=step_G.cpu(),
            confidence_G=ticket.confidence_G.cpu().clone(),
        )


def _known(value: Tensor | None) -> Tensor:
    assert value is not None, "the first pass of a request sets it"
    return value


def normal_noise(seed: int, step: int, num_positions: int, width: int, device: torch.device) -> Tensor:
    """Standard normal numbers [G, D] that are a function of (seed, position, step) alone, by Box and Muller."""
    positions_1G = torch.arange(num_positions, device=device)[None]
    keys_1G = noise_keys(torch.tensor([seed], device=device), positions_1G, torch.tensor([step], device=device))
    half = (width + 1) // 2
    uniform_GH = uniform(keys_1G[0], 2 * half)
    radius_GH = (-2 * uniform_GH[:, :half].log()).sqrt()
    angle_GH = 2 * math.pi * uniform_GH[:, half:]
    return torch.cat([radius_GH * angle_GH.cos(), radius_GH * angle_GH.sin()], 1)[:, :width].float()


# --- requests ---


def check_embedding_request(
    network: Network, settings: EmbeddingSampling, request: Request
) -> tuple[list[int], list[bool]]:
    """The canvas of a request, and which of its positions are open. FewstepError if the network cannot answer it."""
    check_draws_nothing(request.sampling)
    if not request.prompt_ids:
        raise FewstepError("the prompt is empty; give some text")
    mask = network.role.mask_token_id
    assert mask is not None
    if request.canvas is None:
        length = settings.canvas_length or request.max_new_tokens
        if length < request.max_new_tokens:
            raise FewstepError(
                f"max_new_tokens {request.max_new_tokens} exceeds the canvas of {length}; lower it or raise "
                "canvas_length"
            )
        canvas, is_open = [mask] * length, [True] * length
    else:
        canvas, is_open = list(request.canvas), [token == mask for token in request.canvas]
        if not any(is_open):
            raise FewstepError("there is nothing to fill in: the canvas holds no mask token")
    network.check_ids([*request.prompt_ids, *canvas])
    if len(request.prompt_ids) + len(canvas) > network.max_positions:
        raise FewstepError(
            f"a prompt of {len(request.prompt_ids)} tokens and a canvas of {len(canvas)} exceed the "
            f"{network.max_positions} positions of {network.name}; shorten one of them (max_new_tokens)"
        )
    return canvas, is_open


def positions_for(settings: EmbeddingSampling, request: Request) -> int:
    """The positions that a request takes up."""
    new = settings.canvas_length or request.max_new_tokens if request.canvas is None else len(request.canvas)
    return len(request.prompt_ids) + new


def sampler_for(
    network: Network,
    settings: EmbeddingSampling,
    requests: Sequence[Request],
    *,
    batch_size: int = 32,
    kept: object = None,
    fixed_temperature: float | None = None,
) -> EmbeddingSampler:
    """A sampler with slots for these requests: `kept`, if it can stand for a new one. All are checked before anything
    is allocated. FewstepError for the first that cannot be answered, or if there is no memory for so many.
    """
    for request in requests:
        check_embedding_request(network, settings, request)
    num_slots = min(batch_size, max(1, len(requests)))
    length = max((positions_for(settings, request) for request in requests), default=0)
    if isinstance(kept, EmbeddingSampler) and kept.fits(network, settings, num_slots=num_slots, length=length):
        kept.fixed_temperature = fixed_temperature
        return kept
    copies = 2 if settings.guidance else 1
    each = copies * (length + CACHE_LENGTH_BUCKET) * bytes_per_position(network.module.config, network.attention_dtype)
    check_free(network, num_slots, length, bytes_each=each, what="keys and values")
    return EmbeddingSampler(network, settings, num_slots=num_slots, length=length, fixed_temperature=fixed_temperature)
