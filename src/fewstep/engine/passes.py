"""One pass of a decoder on fixed tensors: traced once for each shape, compiled, and captured in a CUDA graph.

Axes: R = slots, r = some of them, X = what the host is told.

The state of all slots stays in the same memory. A pass reads it there, computes what the plain `run_pass` computes, and
writes what has changed back, so that the next pass may follow at once: nothing waits for the host.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.decode.decoder import Decoder, Shape
from fewstep.decode.loop import run_pass, told
from fewstep.decode.state import State
from fewstep.engine.stack import FusedNetwork, compiled
from fewstep.models.cache import KVCache
from fewstep.models.network import Network


@dataclass(frozen=True)
class Passed:
    """What a pass left besides the state; tensors that the next pass of the same shape overwrites.

    `told_XR`: pending positions and front of all slots, then `State.told`. The others are those of `Accepted` and
    `Scores` for the requests of the pass, None unless hidden rows are kept.
    """

    told_XR: Tensor
    positions_RS: Tensor | None = None
    chosen_RS: Tensor | None = None
    hidden_RSD: Tensor | None = None


class Pass:
    """One kind of pass over the slots of a loop, for one whole `Shape`.

    With fused networks it is traced and compiled when it first runs. On a GPU it is one graph from its second run on.
    With `part` it is given the slots of its requests, which are fewer than all; else it is for all slots.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        decoder: Decoder,
        state: State,
        caches: Mapping[str, KVCache],
        shape: Shape,
        *,
        part: bool,
        keep_hidden: bool,
        pool: Any,
    ) -> None:
        self._networks, self._decoder, self._caches, self._shape = networks, decoder, caches, shape
        self._like, self._keep_hidden = state, keep_hidden
        device = state.front_R.device
        self._tensors = [*state.tensors().values(), *(each.all_blocks for each in caches.values())]
        self._slots: list[Tensor] = []
        if part:
            self._slots = [torch.zeros(shape.rows, dtype=torch.long, device=device), torch.zeros((), device=device)]
        self._function: Callable[..., Any] | None = None
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._passed = Passed(told(state))

    @torch.no_grad()
    def __call__(self, slots_r: Tensor) -> Passed:
        """Give the requests in these slots a step; `slots_r` is on the CPU."""
        if self._slots:
            self._choose(slots_r)
        for name, network in self._networks.items():
            if isinstance(network, FusedNetwork):
                network.stack.cache = self._caches.get(name)
        arguments = [*self._tensors, *self._slots]
        if self._function is None:
            fused = any(isinstance(network, FusedNetwork) for network in self._networks.values())
            self._function = compiled(self._run, arguments) if fused else self._run
            self._passed = Passed(*self._function(*arguments))
        elif arguments[0].device.type != "cuda":
            self._passed = Passed(*self._function(*arguments))
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, pool=self._pool):
                    self._passed = Passed(*self._function(*arguments))
            self._graph.replay()
        return self._passed

    def _choose(self, slots_r: Tensor) -> None:
        """Rows beyond the requests stand for some slot that is not among them, and leave it as it is."""
        num_slots, count = len(self._like.front_R), len(slots_r)
        other = next(slot for slot in range(num_slots) if slot not in slots_r)
        rows_r = torch.full((self._shape.rows,), other)
        rows_r[:count] = slots_r
        self._slots[0].copy_(rows_r, non_blocking=True)
        self._slots[1].fill_(count)

    def _run(self, *tensors: Tensor) -> list[Tensor | None]:
        """The pass as a function of the tensors that it reads and writes."""
        rest = iter(tensors)
        state = self._like.map(lambda _: next(rest))
        caches, slots_r, before = {}, None, state
        for name, each in self._caches.items():
            caches[name] = each.with_blocks(next(rest))
        if self._slots:
            slots_r, count = rest
            before = state.select(slots_r)
            is_one_r = torch.arange(len(slots_r), device=slots_r.device) < count
            before = replace(before, done_R=before.done_R | ~is_one_r)
        length = self._shape.cache_length
        views = {name: each.view(slots_r, length) for name, each in caches.items()}
        accepted, scores = run_pass(self._networks, self._decoder, before, views, self._shape)
        after = accepted.state
        if slots_r is not None:
            after = replace(after, done_R=torch.where(is_one_r, after.done_R, state.done_R[slots_r]))
        for kept, old, new in zip(*(one.tensors().values() for one in (state, before, after)), strict=True):
            if new is not old and slots_r is None:
                kept.copy_(new)
            elif new is not old and slots_r is not None:
                kept.index_copy_(0, slots_r, new)
        found = [told(state)]
        if self._keep_hidden:
            return [*found, accepted.positions_RS, accepted.chosen_RS, scores.hidden_RSD]
        return [*found]
