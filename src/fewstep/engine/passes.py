"""One pass of a decoder on fixed tensors, captured in a CUDA graph.

Axes: R = slots, r = some of them, X = what the host is told.

The state of all slots stays in the same memory. A pass reads it there, computes what the plain `run_pass` computes, and
writes what has changed back, so that the next pass may follow at once: nothing waits for the host.

A pass grows faster as it is used. Its first run is the plain one. Then it is captured on fused layers, which takes less
than a second. Compiling takes seconds, or many: a thread does it meanwhile, on tensors of its own, and the loop adopts
the result between requests.
"""

import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewstep.decode.decoder import Decoder, Shape
from fewstep.decode.loop import run_pass, told
from fewstep.decode.state import State
from fewstep.engine.stack import FusedNetwork, compiled, traced
from fewstep.models.cache import KVCache
from fewstep.models.network import Network

_ALONE = threading.Lock()
"""Held by who compiles or captures a pass: what a compiler does on the device would spoil a capture."""

COMPILED_AFTER = 32
"""A pass that has run so often is worth compiling."""


@dataclass(frozen=True)
class Passed:
    """What a pass left besides the state; tensors that the next pass of the same shape overwrites.

    `told_XR`: see `told`, of all slots. The others are those of `Accepted` and `Scores` for the requests of the pass,
    None unless hidden rows are kept.
    """

    told_XR: Tensor
    positions_RS: Tensor | None = None
    chosen_RS: Tensor | None = None
    hidden_RSD: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What the passes of a loop work on. `fused`: the networks with fused layers, by the names of `networks`."""

    networks: Mapping[str, Network]
    fused: Mapping[str, FusedNetwork]
    decoder: Decoder
    state: State
    caches: Mapping[str, KVCache]
    keep_hidden: bool
    pool: Any  # memory of all graphs for what they compute on the way: one runs at a time


class Pass:
    """One kind of pass over the slots of a loop, for one whole `Shape`.

    With `part` it is given the slots of its requests, which are fewer than all; else it is for all slots. `fuse`:
    whether it is worth more than capturing as it is; a prefill is not.
    """

    def __init__(self, slots: Slots, shape: Shape, *, part: bool, fuse: bool) -> None:
        self._slots, self._shape, self._fuse = slots, shape, fuse
        device = slots.state.front_R.device
        self._tensors = [*slots.state.tensors().values(), *(each.all_blocks for each in slots.caches.values())]
        self._chosen: list[Tensor] = []
        if part:
            self._chosen = [torch.zeros(shape.rows, dtype=torch.long, device=device), torch.zeros((), device=device)]
        self._num_runs = 0
        self._function: Callable[..., Any] = self._plain
        self._is_captured = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._passed: Passed | None = None
        self._compiling: Future[Callable[..., Any]] | None = None
        self._is_final = not fuse

    @torch.no_grad()
    def __call__(self, slots_r: Tensor) -> Passed:
        """Give the requests in these slots a step; `slots_r` is on the CPU."""
        if self._chosen:
            self._choose(slots_r)
        self._num_runs += 1
        if self._num_runs > 1 and not self._is_captured and _ALONE.acquire(blocking=False):
            try:
                self._capture(self._traced() if self._fuse else self._plain)
            finally:
                _ALONE.release()
        if self._num_runs == COMPILED_AFTER and not self._is_final:
            self._compiling = _compiler().submit(self._compile)
        if self._graph is None or self._passed is None:
            return Passed(*self._function(*self._arguments))
        self._graph.replay()
        return self._passed

    @torch.no_grad()
    def adopt(self, *, wait: bool = False) -> None:
        """Go on with compiled code if there is some; `wait`: until there is."""
        if self._is_final or not (wait or (self._compiling is not None and self._compiling.done())):
            return
        try:
            function = self._compile() if self._compiling is None else self._compiling.result()
        except Exception as error:  # a compiler may fail in any way, and the pass is right without it
            warnings.warn(f"a pass is not compiled, and slower for that: {_line(error)}", stacklevel=2)
            self._is_final = True
            return
        if _ALONE.acquire(blocking=wait):  # else at the next occasion
            try:
                self._capture(function, compiled=True)
            finally:
                _ALONE.release()
            self._is_final = True

    @property
    def _arguments(self) -> list[Tensor]:
        return [*self._tensors, *self._chosen]

    def _traced(self) -> Callable[..., Any]:
        """The pass on fused layers; the plain one, with a warning, if a decoder or policy cannot be traced."""
        try:
            function = traced(self._on_fused, self._arguments)
        except Exception as error:  # such as a policy of someone's own that reads a number
            self._is_final = True
            warnings.warn(f"a pass cannot be captured, and runs as it is: {_line(error)}", stacklevel=2)
            return self._plain
        self._try(function, compiled=False)
        return function

    def _compile(self) -> Callable[..., Any]:
        """In any thread, while captured passes run."""
        with _ALONE:
            function = compiled(self._on_fused, self._arguments)
            self._try(function, compiled=True)
        return function

    def _try(self, function: Callable[..., Any], *, compiled: bool) -> None:
        """Run it on tensors of its own, without the cache, so that all its kernels are made and loaded."""
        nobodys = [torch.zeros_like(one) for one in self._arguments]
        with torch.no_grad(), ExitStack() as running:
            for name, network in self._slots.fused.items():
                running.enter_context(network.stack.running(self._slots.caches.get(name), compiled=compiled, dry=True))
            function(*nobodys)

    def _capture(self, function: Callable[..., Any], *, compiled: bool = False) -> None:
        """From now on the pass is this function; on a GPU as a graph, if there is memory for it."""

        def run(*arguments: Tensor) -> Any:
            with ExitStack() as running:
                for name, network in self._slots.fused.items():
                    running.enter_context(network.stack.running(self._slots.caches.get(name), compiled=compiled))
                return function(*arguments)

        self._function, self._graph, self._is_captured = run, None, True
        if self._tensors[0].device.type != "cuda":
            return
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may compile meanwhile.
            with torch.cuda.graph(graph, pool=self._slots.pool, capture_error_mode="thread_local"):
                self._passed = Passed(*run(*self._arguments))
        except torch.OutOfMemoryError:
            self._function, self._is_final = self._plain, True
            warnings.warn(
                "there is no memory left to capture a pass, which runs as it is; use fewer slots", stacklevel=2
            )
        else:
            self._graph = graph

    def _choose(self, slots_r: Tensor) -> None:
        """Rows beyond the requests are copies of the first, which are done."""
        rows_r = slots_r[:1].repeat(self._shape.rows)
        rows_r[: len(slots_r)] = slots_r
        self._chosen[0].copy_(rows_r, non_blocking=True)
        self._chosen[1].fill_(len(slots_r))

    def _plain(self, *tensors: Tensor) -> list[Tensor | None]:
        return self._run(self._slots.networks, *tensors)

    def _on_fused(self, *tensors: Tensor) -> list[Tensor | None]:
        return self._run(self._slots.fused, *tensors)

    def _run(self, networks: Mapping[str, Network], *tensors: Tensor) -> list[Tensor | None]:
        """The pass as a function of the tensors that it reads and writes."""
        slots, rest = self._slots, iter(tensors)
        state = before = slots.state.map(lambda _: next(rest))
        caches = {name: each.with_blocks(next(rest)) for name, each in slots.caches.items()}
        slots_r = row_r = None
        if self._chosen:
            slots_r, count = rest
            row_r = torch.arange(len(slots_r), device=slots_r.device)
            before = state.select(slots_r)
            before = replace(before, done_R=before.done_R | (row_r >= count))
            row_r = torch.where(row_r < count, row_r, 0)
        views = {name: each.view(slots_r, self._shape.cache_length) for name, each in caches.items()}
        accepted, scores = run_pass(networks, slots.decoder, before, views, self._shape)
        after = accepted.state
        for kept, old, new in zip(*(one.tensors().values() for one in (state, before, after)), strict=True):
            if new is old:
                continue
            if slots_r is None or row_r is None:
                kept.copy_(new)
            else:
                kept.index_copy_(0, slots_r, new[row_r])
        found = told(state)
        if not slots.keep_hidden:
            return [found]
        return [found, accepted.positions_RS, accepted.chosen_RS, scores.hidden_RSD]


@cache
def _compiler() -> ThreadPoolExecutor:
    """One thread, in which passes are compiled one after another."""
    return ThreadPoolExecutor(1, thread_name_prefix="fewstep-compile")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
