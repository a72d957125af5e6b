"""The loop whose passes are captured: the same decoders and requests, without the host between passes.

Axes: R = slots, r = some of them, X = what the host is told.

The plain loop waits after every round to hear what it left. Here the next round is enqueued first, wherever a decoder
names passes that are right whatever the last round left (`Traits.steady`), and what the host hears is one round old. A
round too many changes nothing: a request that is done stays as it is. Where requests begin, or a decoder has to know,
the host waits as the plain loop does.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.decode.decoder import DRAWINGS, FREE_ROWS, Decoder, Shape
from fewstep.decode.loop import Loop, told
from fewstep.decode.outputs import new_events
from fewstep.decode.policies import BUILT_IN
from fewstep.decode.requests import Event, Request, Ticket
from fewstep.engine.captured_pass import CapturedPass, LoopMemory
from fewstep.engine.stack import FusedNetwork
from fewstep.models.network import Network

SHORTEST_CACHE = 256
"""Attention that has no kernel of ours reads this many slots of the cache, or a power of two times as many."""


@dataclass(frozen=True)
class _InFlight:
    """A round that the host has not heard of: its slots, and where what it leaves will be once the event has come.

    `rows`: what `Loop.events` reads of a state, if someone is told of events.
    """

    live: list[int]
    told_XR: Tensor
    rows: list[Tensor]
    event: torch.cuda.Event | None


class CapturedLoop(Loop):
    """See the module. `fused`: the networks of the decoder's plans, by name, whose layers run fused. `compiles`:
    whether passes that decode are compiled as soon as they are captured, for which the request under way waits.
    """

    def __init__(
        self,
        network: Network,
        decoder: Decoder,
        *,
        fused: Mapping[str, FusedNetwork],
        compiles: bool = False,
        **options: Any,
    ) -> None:
        if options.get("record") is not None:
            raise ValueError("hidden rows are recorded by the plain loop")
        super().__init__(network, decoder, **options)
        self._memory = LoopMemory(
            networks=self._networks,
            fused=fused,
            decoder=decoder,
            state=self.state,
            caches=self._caches,
            compiles=compiles,
            pool=torch.cuda.graph_pool_handle() if network.device.type == "cuda" else None,
        )
        self._passes: dict[tuple[Shape, bool], CapturedPass] = {}
        self._told_XR = told(self.state)
        self._tells_events = False
        self._events: list[tuple[int, Event]] = []
        self._host_memory = deque(self._new_host_memory() for _ in range(3))
        self._in_flight: deque[_InFlight] = deque()
        self._completed: list[int] = []
        self._is_steady = False
        self._steps_before_R = torch.zeros_like(self._pending_R)  # of which the host was told events
        self._attends_by_parts = self.dtype != torch.float32 and all(one.stack.splits for one in fused.values())

    def compile_passes(self) -> None:
        """Compile passes that have run twice so far, prefills among them: seconds each, and then they are faster."""
        for each in self._passes.values():
            each.compile()

    def fits(self, network: Network, decoder: Decoder, **made: Any) -> bool:
        """See Loop. A policy of someone's own may have changed since it was traced, and be equal to itself."""
        mine = self._memory.fused, self._memory.compiles
        return (
            (made["fused"], made["compiles"]) == mine
            and type(decoder.policy) in BUILT_IN
            and super().fits(network, decoder, **made)
        )

    def submit(self, request: Request) -> int:
        """See Loop. An idle loop forgets who was told of events."""
        if not self.busy:
            self._hear(0)
            self._events, self._tells_events = [], False
        return super().submit(request)

    def _new_host_memory(self) -> list[Tensor]:
        """Room for what a round tells, and for its rows."""
        on_device = [self._told_XR, *self._told_of_events()]
        memory = [torch.empty_like(each, device="cpu") for each in on_device]
        return [each.pin_memory() for each in memory] if self.network.device.type == "cuda" else memory

    def _told_of_events(self) -> list[Tensor]:
        state = self.state
        return [state.tokens_RL, state.step_RL, state.confidence_RL, state.num_forwards_R]

    def _round(self) -> Tensor:
        if self._queue or self.admitting:
            self._hear(0)
        begun = self.admitting
        self._admit()
        live_r = (self._pending_R >= 0).nonzero()[:, 0]
        if len(live_r):
            self._is_steady = not begun and self._may_run_ahead()
            if not self._is_steady:
                self._hear(0)
                live_r = (self._pending_R >= 0).nonzero()[:, 0]
        if len(live_r):
            self._enqueue(live_r)
            self._hear(1 if self._is_steady else 0)
            for listener in self.listeners:
                listener(self.state)
        else:
            self._hear(0)
        completed, self._completed = self._completed, []
        return torch.tensor(completed, dtype=torch.long)

    def _admit(self) -> None:
        before = set(self._live)
        super()._admit()
        self._steps_before_R[[slot for slot in self._live if slot not in before]] = 0

    def _may_run_ahead(self) -> bool:
        """Whether passes are known that are right whatever the last round left, and all requests share them."""
        if self.listeners or self.decoder.traits.observe is not None:
            return False
        steady = self.decoder.traits.steady
        return not self.decoder.traits.cached or (bool(steady) and self._are_free(steady))

    def _enqueue(self, live_r: Tensor) -> None:
        """A step of these requests, and the copy of what it leaves to the host."""
        started_s, front_R, traits = time.perf_counter(), self._front_R, self.decoder.traits
        if self._is_steady and traits.cached:
            groups = [(torch.arange(len(live_r)), traits.steady)]
        else:
            groups = list(self.decoder.passes(self._pending_R[live_r], self._length_R[live_r]))
        for members, shapes in groups:
            self._run(live_r[members], shapes)
        told_XR, *rows = self._host_memory.popleft()
        told_XR.copy_(self._told_XR, non_blocking=True)
        if self._tells_events:
            for host, device in zip(rows, self._told_of_events(), strict=True):
                host.copy_(device, non_blocking=True)
        self._in_flight.append(_InFlight(live_r.tolist(), told_XR, rows, _recorded(told_XR)))
        if traits.observe is not None:
            self._hear(0)
            self._observe([shapes for _, shapes in groups], time.perf_counter() - started_s, live_r, front_R)

    def _run(self, slots_r: Tensor, shapes: Sequence[Shape]) -> None:
        # A slot without a request may be in a pass, which leaves it as it is.
        whole = len(slots_r) == int((self._pending_R >= 0).sum()) and self._are_cheap(len(slots_r), shapes)
        rows = self.num_slots if whole else min(1 << (len(slots_r) - 1).bit_length(), self.num_slots)
        drawing = DRAWINGS[int(self._drawing_R[slots_r].max())]
        for shape in shapes:
            shape = replace(shape, rows=rows, cache_length=self._cache_length(slots_r), drawing=drawing)
            self._told_XR = self._pass_for(shape, part=not whole)(slots_r)
            self._num_passes += 1

    def _are_cheap(self, count: int, shapes: Sequence[Shape]) -> bool:
        """Whether a pass of all slots costs about as much as one of so many, and may have slots without a request."""
        if count == self.num_slots or not self.decoder.traits.cached:
            return count == self.num_slots
        return self._are_free(shapes)

    def _are_free(self, shapes: Sequence[Shape]) -> bool:
        """Whether passes of all slots take about as long as reading the weights."""
        widest = max(shape.width for shape in shapes) + self.decoder.traits.pass_length
        return self.num_slots * widest <= FREE_ROWS

    def _cache_length(self, slots_r: Tensor) -> int:
        """Slots that attention reads; our own kernel passes over those that no row sees."""
        if not self.decoder.traits.cached:
            return 0
        if self._attends_by_parts:
            return self.length + 1
        needed = int(self._front_R[slots_r].max()) + 2 * self.decoder.traits.pass_length
        return min(SHORTEST_CACHE << max(0, (needed - 1) // SHORTEST_CACHE).bit_length(), self.length + 1)

    def _pass_for(self, shape: Shape, *, part: bool) -> CapturedPass:
        """Captured passes by their shape. A prefill of one width is seldom run, so its layers are not traced for it."""
        key = shape, part
        if key not in self._passes:
            decodes = not self.decoder.traits.cached or shape.width <= self.decoder.traits.pass_length
            self._passes[key] = CapturedPass(self._memory, shape, part=part, fuse=decodes)
        return self._passes[key]

    def _hear(self, most: int) -> None:
        """Wait until at most so many rounds are in flight; note which requests the others completed."""
        while len(self._in_flight) > most:
            heard = self._in_flight.popleft()
            if heard.event is not None:
                heard.event.synchronize()
            self._note(heard.told_XR.clone())
            if self._tells_events:
                going_on = [slot for slot in heard.live if slot in self._live and slot not in self._completed]
                self._events += self._events_of({slot: self._live[slot] for slot in going_on}, heard.rows)
            self._host_memory.append([heard.told_XR, *heard.rows])
            ended = [slot for slot in heard.live if self._pending_R[slot] < 0 and slot in self._live]
            self._completed += [slot for slot in ended if slot not in self._completed]

    def _events_of(self, tickets: Mapping[int, Ticket], rows: Sequence[Tensor]) -> list[tuple[int, Event]]:
        """What has become final in these slots since they were told of last; `rows` as `_told_of_events`."""
        found: list[tuple[int, Event]] = []
        for slot, ticket in tickets.items():
            tokens_L, step_L, confidence_L, num_steps = (each[slot] for each in rows)
            events = new_events(ticket.request, tokens_L, step_L, confidence_L, self._steps_before_R[slot])
            found += [(ticket.number, event) for event in events]
            self._steps_before_R[slot] = num_steps
        return found

    def events(self) -> list[tuple[int, Event]]:
        """See Loop; of the rounds that the host has heard of since the last call."""
        if not self._tells_events:  # nobody has asked before: from now on every round tells
            self._hear(0)
            self._tells_events = True
            self._events = self._events_of(self._seen, [each.cpu() for each in self._told_of_events()])
        found, self._events = self._events, []
        return found

    def _stop(self, slot: int) -> None:
        self._hear(0)
        number = self._live[slot].number
        super()._stop(slot)
        self._events = [one for one in self._events if one[0] != number]
        self._completed = [one for one in self._completed if one != slot]


def _recorded(like: Tensor) -> torch.cuda.Event | None:
    """An event after what was enqueued; None on a CPU, where nothing is."""
    if not torch.cuda.is_available() or not like.is_pinned():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
