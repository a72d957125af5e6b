"""The loop that runs a decoder for many requests: slots that are refilled, rounds of passes, hidden rows recorded.

Axes: R = slots, r = some of them, L = positions, S = positions scored in a step, G = canvas positions, D = hidden
width, X = integers of a slot that the host reads.

A round gives every live request one step. Small batches take it together; large ones in groups, one per plan shape,
each with the requests that need it. After a round the host reads a few integers per slot, and nothing per token.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from fewstep.decode.admission import check_memory, check_request, positions_needed
from fewstep.decode.decoder import (
    DRAWINGS,
    Accepted,
    Decoder,
    Round,
    Shape,
    drawing_of,
    whole_blocks,
)
from fewstep.decode.generator import Generator, answer, given_up
from fewstep.decode.outputs import new_events, output_of, with_record
from fewstep.decode.prefill import Prefiller
from fewstep.decode.requests import Event, Output, Record, Request, Ticket
from fewstep.decode.sharing import Sharing, strict_groups
from fewstep.decode.state import State
from fewstep.decode.steps import begin, free_slots
from fewstep.errors import FewstepError
from fewstep.models.cache import KVCache
from fewstep.models.network import Network, Scores, check_draft
from fewstep.models.threads import sparing_threads
from fewstep.values import fitted, shown

CACHE_LENGTH_BUCKET = 64
"""Attention reads the cache up to a multiple of this, past the furthest request of the pass."""

SURE_TO_FIT = 1 << 14
"""Positions of all slots up to which nobody asks whether there is memory for them."""

ROOM_FOR_STOP_TOKENS = 4
"""A request may name this many stop tokens, or as many as the network has."""

Listener = Callable[[State], None]
"""Called after every round with the state of all slots; a free slot is `done`."""


def run_pass(
    networks: Mapping[str, Network], decoder: Decoder, state: State, caches: Mapping[str, KVCache], shape: Shape
) -> tuple[Accepted[State], Scores]:
    """One pass of all requests in `state`: the seam where a captured engine replays the same calls as one graph.

    Networks and caches by the name that a plan gives them; an uncached decoder has no caches.
    """
    plan = decoder.plan(state, shape)
    scores = networks[plan.network].score(plan, caches.get(plan.network))
    return decoder.accept(state, shape, scores), scores


def told(state: State) -> Tensor:
    """What the host reads of every request after a round: pending positions, front, and `State.told`, [X, R]."""
    return torch.stack((state.pending_R, state.front_R, *state.told))


RunPass = Callable[
    [Mapping[str, Network], Decoder, State, Mapping[str, KVCache], Shape], tuple[Accepted[State], Scores]
]


class Loop:
    """Decodes submitted requests in `num_slots` slots; requests may be submitted between any two rounds.

    `length`: the most positions a request may need (`positions_needed`). `companions`: networks in the place of those
    that the decoder names. `sharing`: what requests share besides passes. `num_prefilled` counts the positions that
    were pending in requests that began, `num_reused` those that were in the cache already.
    """

    def __init__(
        self,
        network: Network,
        decoder: Decoder,
        *,
        num_slots: int,
        length: int,
        record: Record | None = None,
        listeners: Sequence[Listener] = (),
        run_pass: RunPass = run_pass,
        companions: Mapping[str, Network] | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        traits = decoder.traits
        if num_slots < 1:
            raise FewstepError(f"batch_size must be at least 1, got {num_slots}")
        if record is not None and traits.guided:
            raise FewstepError(
                "with cfg_scale no single hidden row gives a token's distribution, so none is recorded; leave it out"
            )
        if record is not None and traits.branching:
            raise FewstepError(
                f"the {decoder.name} decoder cannot record hidden rows; record with the autoregressive decoder"
            )
        self.network = network
        for companion in traits.companions.values():
            check_draft(network, companion)
        self._companions = dict(companions or {})
        self._networks = {"target": network, **traits.companions, **self._companions}
        self.decoder = decoder
        self._run_pass = run_pass
        self._num_stop_tokens = max(len(network.stop_token_ids), ROOM_FOR_STOP_TOKENS)
        # With the cache's scratch slot a multiple of the bucket, as attention kernels like it.
        self.length = length = whole_blocks(length + 1, CACHE_LENGTH_BUCKET) - 1
        self.state = free_slots(self._begin([]), num_slots, network.device)
        self._caches = {
            name: each.new_cache(num_slots, length) for name, each in self._networks.items() if traits.cached
        }
        self._num_parameters = network.num_parameters
        self.record = record
        self.dtype = network.dtype
        self.num_slots = num_slots
        self._hidden_RLD = self._new_hidden_rows(num_slots) if record else None
        self.listeners = list(listeners)
        self._queue: deque[Ticket] = deque()
        self._live: dict[int, Ticket] = {}
        self._seen: dict[int, Ticket] = {}  # slot -> request of the last round, also of those that it completed
        self._steps_before_R = self.state.num_forwards_R  # of every slot, before the last round
        self._free = list(range(num_slots))[::-1]
        self._num_submitted = 0
        self.strict = sharing is not None and sharing.strict
        self._prefiller = None if sharing is None else Prefiller(sharing, decoder, self._networks, self._caches)
        self.num_prefilled = self.num_reused = self._num_passes = 0
        # The host's copy of what decides the passes of a round.
        self._pending_R = torch.full((num_slots,), -1)
        self._front_R = torch.zeros(num_slots, dtype=torch.long)
        self._length_R = torch.zeros(num_slots, dtype=torch.long)
        self._drawing_R = torch.zeros(num_slots, dtype=torch.long)  # numbers of DRAWINGS
        self._noted_XR = torch.stack((self._pending_R, self._front_R))

    def fits(
        self,
        network: Network,
        decoder: Decoder,
        *,
        num_slots: int,
        length: int,
        record: Record | None,
        run_pass: RunPass,
        companions: Mapping[str, Network] | None,
        **more: Any,
    ) -> bool:
        """Whether this loop is idle and can stand for a new one of these. `more`: what its class takes beside."""
        if self.busy or (self.network, self.num_slots, self._run_pass) != (network, num_slots, run_pass):
            return False
        if self._companions != dict(companions or {}):
            return False
        if self.decoder != decoder or self.record != record:
            return False
        # A much longer slot would make every pass of short requests slower.
        in_length = length <= self.length < 2 * length + CACHE_LENGTH_BUCKET
        return in_length and (self.state.done_R.device, self.dtype) == (network.device, network.dtype)

    @property
    def num_passes(self) -> int:
        """Passes of all networks so far."""
        return self._num_passes + (0 if self._prefiller is None else self._prefiller.num_passes)

    @property
    def live(self) -> dict[int, int]:
        """Slot -> number of the request in it; for a listener also those that the round completed."""
        return {slot: ticket.number for slot, ticket in self._live.items()}

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._live)

    def submit(self, request: Request) -> int:
        """Queue a request; returns the number with which `step` hands out its output. FewstepError if it cannot run."""
        stops = self.network.stop_token_ids if request.stop_token_ids is None else request.stop_token_ids
        request = replace(request, stop_token_ids=stops)
        if len(stops) > self._num_stop_tokens:
            raise FewstepError(f"a request names at most {self._num_stop_tokens} stop tokens")
        canvas = check_request(self.network, self.decoder, request)
        if positions_needed(self.decoder, request, canvas) > self.length:
            raise FewstepError(f"the request needs more than the {self.length} positions that a slot has")
        self._num_submitted += 1
        self._queue.append(Ticket(self._num_submitted - 1, request, canvas, time.perf_counter()))
        return self._num_submitted - 1

    @torch.no_grad()
    def step(self) -> list[tuple[int, Output]]:
        """One round: admit what is queued, give every live request one step; returns those that it completed."""
        num_requests = min(len(self._live) + len(self._queue), self.num_slots)
        num_requests = self.num_slots if self.strict else num_requests
        with sparing_threads(self.state.done_R.device, self._num_parameters, num_requests):
            completed_r = self._round()
            self._seen = dict(self._live)
            return self._collect(completed_r)

    def events(self) -> list[tuple[int, Event]]:
        """What the last round finalised in every slot, each with the number of its request; by slot, then by position.

        Tokens past `max_new_tokens`, or past an end-of-text that is final, are left out. One finalised before the
        end-of-text in front of it was may have been told; the output cuts it.
        """
        if not self._seen:
            return []
        slots_r = torch.tensor(list(self._seen), device=self.network.device)
        state = self.state
        told = (state.tokens_RL, state.step_RL, state.confidence_RL, self._steps_before_R)
        rows = zip(*(field[slots_r].cpu() for field in told), strict=True)
        return [
            (ticket.number, event)
            for ticket, row in zip(self._seen.values(), rows, strict=True)
            for event in new_events(ticket.request, *row)
        ]

    def cancel(self, number: int) -> Output | None:
        """Give a request up; its slot is free for the next. Its output ends before its first open position.

        None if it was not begun yet. FewstepError if it is neither queued nor under way.
        """
        slot = given_up(number, self._queue, self._live)
        if slot is None:
            return None
        self._stop(slot)
        with torch.no_grad():
            return self._collect(torch.tensor([slot]))[0][1]

    @torch.inference_mode()
    def _stop(self, slot: int) -> None:
        slot_r = torch.tensor([slot], device=self.network.device)
        self.state.done_R.index_fill_(0, slot_r, True)
        self._pending_R[slot] = -1

    @torch.inference_mode()  # a tenth of a small pass on a CPU; outputs are made outside it, since training uses them
    def _round(self) -> Tensor:
        """The slots that completed."""
        self._admit()
        live_r = (self._pending_R >= 0).nonzero()[:, 0]
        if not len(live_r):
            return live_r
        self._steps_before_R = self.state.num_forwards_R.clone()
        started_s, front_R = time.perf_counter(), self._front_R
        pending_r, length_r = self._pending_R[live_r], self._length_R[live_r]
        split = strict_groups(self.decoder, pending_r, length_r) if self.strict else None
        groups = list(split or self.decoder.passes(pending_r, length_r))
        for members, shapes in groups:
            self._run(live_r[members], shapes)
        self._note(told(self.state).cpu())
        if self.decoder.traits.observe is not None:
            self._observe([shapes for _, shapes in groups], time.perf_counter() - started_s, live_r, front_R)
        for listener in self.listeners:
            listener(self.state)
        return live_r[self._pending_R[live_r] < 0]

    @property
    def admitting(self) -> bool:
        """Whether the next round lets a request begin, or goes on with a prompt that is prefilled in pieces."""
        return bool(self._queue and self._free) or (self._prefiller is not None and self._prefiller.busy)

    def _note(self, told_XR: Tensor) -> None:
        """Keep on the host what the round left."""
        self._noted_XR = told_XR
        self._pending_R, self._front_R = told_XR[:2]

    def _observe(
        self, shapes: Sequence[Sequence[Shape]], seconds: float, live_r: Tensor, front_before_R: Tensor
    ) -> None:
        """Give the decoder the round that was noted last."""
        observe = self.decoder.traits.observe
        assert observe is not None
        observe(
            Round(
                shapes=shapes,
                seconds=seconds,
                advance_r=(self._front_R - front_before_R)[live_r],
                pending_r=self._pending_R[live_r],
                told_Xr=self._noted_XR[2:, live_r],
            )
        )

    def _admit(self) -> None:
        prefiller, joining = self._prefiller, list[tuple[list[int], State]]()
        if prefiller is None:
            count = min(len(self._queue), len(self._free))
            tickets, slots = [self._queue.popleft() for _ in range(count)], [self._free.pop() for _ in range(count)]
        else:
            joining = prefiller.go_on()
            tickets, slots = prefiller.choose(self._queue, self._free)
        if tickets:
            self._live.update(zip(slots, tickets, strict=True))
            for slot, ticket in zip(slots, tickets, strict=True):
                self._length_R[slot] = positions_needed(self.decoder, ticket.request, ticket.canvas)
                self._drawing_R[slot] = DRAWINGS.index(drawing_of(ticket.request))
            is_new_R = torch.zeros_like(self._pending_R, dtype=torch.bool).index_fill(0, torch.tensor(slots), True)
            for cache in self._caches.values():
                cache.reset(is_new_R.to(self.network.device))
            rows = self._begin(tickets)
            rows = rows if prefiller is None else prefiller.prepared(rows)
            self.num_prefilled += int((rows.front_R - rows.cached_R).sum())
            self.num_reused += int(rows.cached_R.sum()) if self._caches else 0
            joining.append((slots, rows))
        for slots, rows in joining:
            slots_r = torch.tensor(slots)
            self._pending_R[slots_r] = rows.pending_R.cpu()
            self._front_R[slots_r] = rows.front_R.cpu()
            self.state.put(slots_r.to(self.network.device), rows.to(self.network.device))

    def _begin(self, tickets: Sequence[Ticket]) -> State:
        return begin(
            self.decoder,
            [ticket.request for ticket in tickets],
            [ticket.canvas for ticket in tickets],
            self.length,
            pad_token_id=self.network.pad_token_id,
            num_stop_tokens=self._num_stop_tokens,
        )

    def _run(self, slots_r: Tensor, shapes: Sequence[Shape]) -> None:
        """One step of these slots; a subset is copied out and back, so that nothing is computed for the others."""
        if self.strict and len(slots_r) < self.num_slots:
            self._run_among_all(slots_r, shapes)
            return
        subset_r = None if len(slots_r) == len(self._pending_R) else slots_r.to(self.network.device)
        state = self.state if subset_r is None else self.state.select(subset_r)
        traits = self.decoder.traits
        cache_length = 0
        if traits.cached:
            needed = self.length if self.strict else int(self._front_R[slots_r].max()) + traits.pass_length
            cache_length = min(whole_blocks(needed, CACHE_LENGTH_BUCKET), self.length + 1)
        caches = {name: cache.view(subset_r, cache_length) for name, cache in self._caches.items()}
        drawing = DRAWINGS[int(self._drawing_R[slots_r].max())]
        for shape in shapes:
            shape = replace(shape, rows=len(slots_r), cache_length=cache_length, drawing=drawing)
            self._num_passes += 1
            accepted, scores = self._run_pass(self._networks, self.decoder, state, caches, shape)
            if self._hidden_RLD is not None:
                self._keep_hidden(subset_r, accepted, scores)
            state = accepted.state
        if subset_r is None:
            self.state = state
        else:
            self.state.put(subset_r, state)

    def _run_among_all(self, slots_r: Tensor, shapes: Sequence[Shape]) -> None:
        """One step of these slots in passes of all of them. In the place of each other one stands a copy of the first,
        which is done.
        """
        mine_r, before, drawing_R = slots_r.to(self.network.device), self.state, self._drawing_R
        others_R = torch.ones_like(before.done_R).index_fill(0, mine_r, False)
        standing_R = torch.where(others_R, mine_r[0], torch.arange(self.num_slots, device=mine_r.device))
        self.state = replace(before.select(standing_R), done_R=others_R)
        self._drawing_R = torch.full_like(drawing_R, int(drawing_R[slots_r].max()))
        self._run(torch.arange(self.num_slots), shapes)
        after, self.state, self._drawing_R = self.state, before, drawing_R
        self.state.put(mine_r, after.select(mine_r))

    def _new_hidden_rows(self, num_slots: int) -> Tensor:
        """One row a position, and a last one that takes what is not kept."""
        width = self.network.module.config.hidden_size
        return torch.zeros((num_slots, self.length + 1, width), device=self.network.device, dtype=self.network.dtype)

    def _keep_hidden(self, subset_r: Tensor | None, accepted: Accepted[State], scores: Scores) -> None:
        assert self._hidden_RLD is not None
        if accepted.positions_RS is None or accepted.chosen_RS is None:
            return
        slots_R = torch.arange(len(self._pending_R), device=self.network.device) if subset_r is None else subset_r
        kept_RS = torch.where(accepted.chosen_RS, accepted.positions_RS, self.length)
        self._hidden_RLD[slots_R[:, None], kept_RS] = scores.hidden_RSD

    def _collect(self, slots_r: Tensor) -> list[tuple[int, Output]]:
        """The outputs of slots that are done, which become free."""
        if not len(slots_r):
            return []
        on_device_r = slots_r.to(self.network.device)
        state = self.state.select(on_device_r).to(torch.device("cpu"))
        hidden_rLD = None if self._hidden_RLD is None else self._hidden_RLD[on_device_r]
        finished_s = time.perf_counter()
        completed = []
        for row, slot in enumerate(slots_r.tolist()):
            ticket = self._live.pop(slot)
            self._free.append(slot)
            if self._prefiller is not None:
                self._prefiller.leave(slot, ticket, state, row)
            seconds = finished_s - ticket.submitted_s
            output = output_of(ticket.request, ticket.canvas, state, row, seconds=seconds)
            if hidden_rLD is not None and self.record is not None:
                start = len(ticket.request.prompt_ids)
                hidden_GD = hidden_rLD[row, start : start + len(ticket.canvas.tokens)]
                output = with_record(output, hidden_GD, self.record, self.network)
            completed.append((ticket.number, output))
        return completed


def loop_for(
    network: Network,
    decoder: Decoder,
    requests: Sequence[Request],
    *,
    batch_size: int = 32,
    record: Record | None = None,
    listeners: Sequence[Listener] = (),
    kept: Generator | None = None,
    run_pass: RunPass = run_pass,
    companions: Mapping[str, Network] | None = None,
    kind: type[Loop] = Loop,
    **more: Any,
) -> Loop:
    """A loop with slots for these requests: `kept`, if it can stand for a new one. All are checked before anything is
    allocated. `kind`: the class of the loop, and `more` what it is made with beside. FewstepError for the first that
    cannot be decoded.
    """
    fitted(batch_size, Annotated[int, Ge(1)], "batch_size")
    if not isinstance(listeners, Sequence) or not all(callable(one) for one in listeners):
        raise FewstepError(f"listeners must be a list of functions of the state, got {shown(listeners)}")
    if not isinstance(record, Record | None):
        raise FewstepError(f"record must be a Record, which says what is kept of each token, got {shown(record)}")
    lengths = [positions_needed(decoder, request, check_request(network, decoder, request)) for request in requests]
    num_slots, length = min(batch_size, max(1, len(requests))), max(lengths, default=0)
    if num_slots * length > SURE_TO_FIT:
        check_memory(network, decoder, num_slots, length, companions)
    made: dict[str, Any] = {
        "num_slots": num_slots, "length": length, "record": record, "run_pass": run_pass, "companions": companions,
    }  # fmt: skip
    if type(kept) is not kind or not kept.fits(network, decoder, **made, **more):
        return kind(network, decoder, listeners=listeners, **made, **more)
    kept.listeners = list(listeners)
    return kept


def decode(
    network: Network,
    requests: Sequence[Request],
    decoder: Decoder,
    *,
    on_output: Callable[[int, Output], None] | None = None,
    **options: Any,
) -> list[Output]:
    """Decode all requests, longest first, in slots that are refilled at once; outputs in the given order.

    `on_output(index, output)` is called as each completes. `options`: `batch_size`, `record`, `listeners` and
    `run_pass` of `loop_for`.
    """
    return answer(loop_for(network, decoder, requests, **options), requests, on_output=on_output)
