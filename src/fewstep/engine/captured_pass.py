"""One pass of a decoder on fixed tensors, captured in a CUDA graph.

Axes: R = requests of a loop, r = some of them, X = what the host is told.

The state of all requests stays in the same memory. A pass reads it there, computes what the plain `run_pass` computes,
and writes what has changed back, so that the next pass may follow at once: nothing waits for the host.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.decode.decoder import Decoder, Shape
from fewstep.decode.loop import run_pass, told
from fewstep.decode.state import State
from fewstep.engine.stack import FusedNetwork, compiled, traced
from fewstep.models.cache import KVCache
from fewstep.models.network import Network


@dataclass(kw_only=True)
class LoopMemory:
    """What the passes of a loop work on. `fused`: the networks with fused layers, by the names of `networks`.

    `compiles`: whether passes with fused layers are compiled as soon as they are captured. `pool`: memory of all graphs
    for what they compute on the way, since one runs at a time. `is_traceable`: whether a
    pass of this decoder and policy could be traced; None: nobody has tried.
    """

    networks: Mapping[str, Network]
    fused: Mapping[str, FusedNetwork]
    decoder: Decoder
    state: State
    caches: Mapping[str, KVCache]
    compiles: bool
    pool: Any
    is_traceable: bool | None = None


class CapturedPass:
    """One kind of pass of a loop, for one whole `Shape`: plain when it first runs, captured from the second time on.

    With `part` it is given the slots of its requests, which are fewer than all; else it is for all slots. `fuse`:
    whether layers are fused as soon as it is captured; those of a prefill only when it is compiled.
    """

    def __init__(self, memory: LoopMemory, shape: Shape, *, part: bool, fuse: bool) -> None:
        self._memory, self._shape, self._fuse = memory, shape, fuse
        device = memory.state.front_R.device
        self._tensors = [*memory.state.tensors().values(), *(each.all_blocks for each in memory.caches.values())]
        self._chosen: list[Tensor] = []
        if part:
            self._chosen = [torch.zeros(shape.rows, dtype=torch.long, device=device), torch.zeros((), device=device)]
        self._num_runs = 0
        self._function: Callable[..., Tensor] | None = None  # None: the plain one
        self._graph: torch.cuda.CUDAGraph | None = None
        self._told_XR: Tensor | None = None
        self._is_captured = self._is_compiled = False

    @torch.no_grad()
    def __call__(self, slots_r: Tensor) -> Tensor:
        """Give the requests in these slots, on the CPU, a step; what is told of all, [X, R], until the next run."""
        if self._chosen:
            self._choose(slots_r)
        self._num_runs += 1
        if self._num_runs == 2:
            self._begin()
            if self._fuse and self._memory.compiles:
                self.compile()
        if self._graph is not None and self._told_XR is not None:
            self._graph.replay()
            return self._told_XR
        return self._computed(self._function, compiled=self._is_compiled)

    @torch.no_grad()
    def compile(self) -> None:
        """Go on compiled, from now on; it takes seconds. A warning if that fails: the pass stays as it is."""
        if not self._is_captured or self._is_compiled:
            return
        try:
            function = compiled(self._on_fused, self._arguments)
            self._try(function, compiled=True)
            self._capture(function, compiled=True)
        except Exception as error:  # a compiler may fail in any way
            warnings.warn(f"a pass is not compiled, and slower for that: {_line(error)}", stacklevel=2)

    @property
    def _arguments(self) -> list[Tensor]:
        return [*self._tensors, *self._chosen]

    def _begin(self) -> None:
        """Capture the pass; with a warning it stays the plain one if that cannot be."""
        memory = self._memory
        if memory.is_traceable is False or not (self._fuse or memory.is_traceable):
            return
        try:
            if self._fuse:
                memory.is_traceable = False
                function = traced(self._on_fused, self._arguments)
                memory.is_traceable = True
                self._try(function, compiled=False)
                self._capture(function)
            else:
                self._capture(None)
        except torch.OutOfMemoryError:
            warnings.warn(
                "there is no memory left to capture a pass, which runs as it is; use fewer slots", stacklevel=3
            )
        except Exception as error:  # such as a policy of someone's own that reads a number
            warnings.warn(f"a pass cannot be captured, and runs as it is: {_line(error)}", stacklevel=3)

    def _try(self, function: Callable[..., Tensor], *, compiled: bool) -> None:
        """Run it on tensors of its own, without the cache, so that all its kernels are made and loaded."""
        with self._running(compiled=compiled, dry=True):
            function(*(torch.zeros_like(one) for one in self._arguments))

    def _capture(self, function: Callable[..., Tensor] | None, *, compiled: bool = False) -> None:
        """From now on the pass is this function, None: the plain one; on a GPU as a graph."""
        if self._tensors[0].device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory.pool):
                told_XR = self._computed(function, compiled=compiled)
            self._graph, self._told_XR = graph, told_XR
        self._function, self._is_captured, self._is_compiled = function, True, compiled

    def _computed(self, function: Callable[..., Tensor] | None, *, compiled: bool) -> Tensor:
        if function is None:
            return self._run(self._memory.networks, *self._arguments)
        with self._running(compiled=compiled):
            return function(*self._arguments)

    def _running(self, **how: bool) -> ExitStack:
        """Within this block the layers of all networks work on the caches of this loop; see `Stack.running`."""
        running = ExitStack()
        for name, network in self._memory.fused.items():
            running.enter_context(network.stack.running(self._memory.caches.get(name), **how))
        return running

    def _choose(self, slots_r: Tensor) -> None:
        """Rows beyond the requests are copies of the first, which are done."""
        rows_r = slots_r[:1].repeat(self._shape.rows)
        rows_r[: len(slots_r)] = slots_r
        self._chosen[0].copy_(rows_r, non_blocking=True)
        self._chosen[1].fill_(len(slots_r))

    def _on_fused(self, *tensors: Tensor) -> Tensor:
        return self._run(self._memory.fused, *tensors)

    def _run(self, networks: Mapping[str, Network], *tensors: Tensor) -> Tensor:
        """The pass as a function of the tensors that it reads and writes."""
        memory, rest = self._memory, iter(tensors)
        state = before = memory.state.map(lambda _: next(rest))
        caches = {name: each.with_blocks(next(rest)) for name, each in memory.caches.items()}
        slots_r = row_r = None
        if self._chosen:
            slots_r, count = rest
            row_r = torch.arange(len(slots_r), device=slots_r.device)
            before = state.select(slots_r)
            before = replace(before, done_R=before.done_R | (row_r >= count))
            row_r = torch.where(row_r < count, row_r, 0)
        views = {name: each.view(slots_r, self._shape.cache_length, looks=False) for name, each in caches.items()}
        after = run_pass(networks, memory.decoder, before, views, self._shape)[0].state
        for kept, old, new in zip(*(one.tensors().values() for one in (state, before, after)), strict=True):
            if new is old:
                continue
            if slots_r is None or row_r is None:
                kept.copy_(new)
            else:
                kept.index_copy_(0, slots_r, new[row_r])
        return told(state)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
