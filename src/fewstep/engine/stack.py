"""A network whose layers run fused: the stock module stays its definition, and its parameters are shared.

Axes: R = requests, Q = rows of a forward, D = hidden width.

Three things are done to a copy of the module that shares the parameters of the original:

- Linear modules that are given the same input (query, key and value; gate and up) become slices of one product. Which
  ones they are is seen in a forward of a layer, so no family is named here. Their weights are moved into one tensor, of
  which the original's parameters become views: nothing is in memory twice.
- Each layer becomes one opaque call, the operator `fewstep::layer`, in whatever graph a whole pass is traced into. All
  layers are one function of different parameters, so it is traced and compiled once for each shape of its rows, and not
  once for each layer.
- Attention is that of `engine.attention`, where the class takes plain attention.

What comes out is compared with the original before it is used: see `fused`.
"""

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from fewstep.engine.attention import SPLIT_ATTENTION, LayerCache, attending
from fewstep.engine.parity import difference_of_layers, few_rows
from fewstep.errors import FewstepError
from fewstep.models.cache import KVCache
from fewstep.models.gated import GatedAdapter, GatedLinear
from fewstep.models.network import Network, Plan
from fewstep.models.quantize import Float8Linear
from fewstep.models.roles import INVISIBLE
from fewstep.models.shared import merged_weight

Shared = tuple[Tensor | None, ...]
"""Mask, cosine, sine, slots, requests and adapted rows."""

_NOTHING: Shared = (None,) * 6
_SLOTS, _NUM_GIVEN = 4, 7
"""Of the arguments of a layer, which begin with its hidden rows."""

_STACKS: WeakValueDictionary[int, "Stack"] = WeakValueDictionary()
_numbers = itertools.count()


def _logsumexp(x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
    """In two steps, of parts and of the parts: a compiled kernel gives a row of any length to one program."""
    length = x.shape[-1]
    if dims not in ([-1], [x.dim() - 1]) or keepdim or length < 2 * _PART:
        return NotImplemented
    parts = nn.functional.pad(x, (0, -length % _PART), value=float("-inf")).unflatten(-1, (-1, _PART))
    best = parts.amax(-1)
    base = torch.where(best.isinf(), 0.0, best)
    sums = (parts - base[..., None]).exp().sum(-1)
    highest = best.amax(-1)
    return (sums * (base - highest[..., None]).exp()).sum(-1).log() + highest


_PART = 4096
_WRITTEN_OUT = {torch.ops.aten.logsumexp.default: _logsumexp}

_WAITING = {
    getattr(torch.ops.aten, name).default
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive")
}
"""Operators whose result's shape, or the program's next step, depends on numbers: a graph cannot hold them."""

_TRACING = threading.RLock()
"""A trace puts its own tensors into modules, for a while."""


def traced(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """The function of these tensors (and None) as one graph, for arguments of these shapes.

    It is traced without being run. Whatever it does to Python objects happens in the trace only.
    """
    with _TRACING:
        graph = make_fx(function, _WRITTEN_OUT, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    if waits := [node for node in graph.graph.nodes if node.target in _WAITING]:
        raise RuntimeError(f"it waits for a number of the device ({waits[0].target})")
    device = next(one.device for one in arguments if one is not None)
    for node in graph.graph.find_nodes(op="get_attr"):
        constant = getattr(graph, node.target)
        if constant.device != device:  # a number that Python wrote into a tensor; a captured graph cannot fetch it
            setattr(graph, node.target, constant.to(device))
    return graph


def compiled(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """As `traced`, and compiled when it is first run."""
    return torch.compile(traced(function, arguments), dynamic=False)


class FusedNetwork(Network):
    """`network` with fused layers: the same role, tokenizer and parameters, and the same numbers up to rounding.

    Its forwards are meant to be traced, once for each shape, and what is traced to run within `stack.running`.
    """

    def __init__(self, network: Network) -> None:
        vars(self).update(vars(network))
        shared = [*network.module.parameters(), *network.module.buffers()]
        if network.adapter is not None:
            shared += [*network.adapter.parameters(), *network.adapter.buffers()]
        memory = {id(tensor): tensor for tensor in shared}
        self.module = copy.deepcopy(network.module, memory)
        self.adapter = copy.deepcopy(network.adapter, memory)
        if splits := self.module._supports_sdpa:
            self.module.set_attn_implementation(SPLIT_ATTENTION)
        layers = self.module.base_model.layers
        self.copies_weights = _give_each_row_its_weights(layers)
        self.stack = Stack(layers, self.adapter, _sharing_an_input(self), splits=splits)
        self.module.base_model.layers = self.stack.stand_ins()
        self.never_drawn = self.never_drawn.to(self.device)

    def hidden(self, plan: Plan, cache: KVCache | None = None) -> Tensor:
        with self.stack.running(cache):
            return super().hidden(plan, cache)

    def _mask(self, plan: Plan, cache: KVCache | None, sliding_window: int | None) -> Tensor:
        """As the network's, but that rows of nobody see one slot: what no row sees is not read."""
        mask = super()._mask(plan, cache, sliding_window)
        if plan.slots_RQ is None or sliding_window is not None:
            return mask
        is_nobodys_RQ = plan.blocks_RQ == INVISIBLE
        later_K = torch.arange(mask.shape[-1], device=mask.device) > 0
        return mask.masked_fill((is_nobodys_RQ[:, :, None] & later_K)[:, None], float("-inf"))


_TOLERANCE = {"torch.float32": 1e-3, "fp8": 0.2}
"""How far what fused layers add may be from what the stock ones add; in other numbers 0.1. Numbers of float8 have three
bits, and some are rounded otherwise where the rows before them differ in the last bit.
"""


def fused(network: Network) -> FusedNetwork:
    """FewstepError, with the reason, for a network that cannot be run so: its rows come out otherwise."""
    try:
        made = FusedNetwork(network)
        found = difference_of_layers(made, network)
    except Exception as error:  # code of any class, called in a way that it may not know
        reason = " ".join(str(error).split())[:160]
        raise FewstepError(f"the layers of {network.name} cannot be fused ({reason})") from error
    if not found <= _TOLERANCE.get(network.quantized or str(network.dtype), 0.1):
        raise FewstepError(f"the layers of {network.name} compute something else when they are fused")
    return made


class _Now(threading.local):
    """What the layers work on, in each thread: see `Stack.running`; `given` and `held`: see `Stack.unless_held`."""

    cache: KVCache | None = None
    compiled: bool = False
    dry: bool = False
    given: Shared = _NOTHING
    held: Shared = _NOTHING


class Stack:
    """The layers of a module, as one function of a layer's parameters."""

    def __init__(
        self, layers: nn.ModuleList, adapter: GatedAdapter | None, groups: list[list[str]], *, splits: bool
    ) -> None:
        self.splits = splits
        self.layers = list(layers)
        self.gate = None if adapter is None else adapter.gate
        self._now = _Now()
        self.number = next(_numbers)
        _STACKS[self.number] = self
        for layer in self.layers:
            _fuse_products(layer, groups)
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = 0  # type: ignore[assignment]  # a layer is given the part of the cache that is its own
        self._tensors = [{**dict(layer.named_parameters()), **dict(layer.named_buffers())} for layer in self.layers]
        self._kinds = [_kind(layer) for layer in self.layers]
        self._functions: dict[Any, Callable[..., Tensor]] = {}
        self.cache_name = "past_key_values"

    @contextmanager
    def running(self, cache: KVCache | None, *, compiled: bool = False, dry: bool = False) -> Iterator[None]:
        """Within this block, in this thread, layers work on this cache, and are compiled or traced only.

        `dry`: they are compiled for what they are given, but compute nothing, and leave the cache alone.
        """
        before, now = vars(self._now).copy(), self._now
        now.cache, now.compiled, now.dry = cache, compiled, dry
        try:
            yield
        finally:
            vars(now).clear()
            vars(now).update(before)

    def stand_ins(self) -> nn.ModuleList:
        return nn.ModuleList(_StandIn(self, index, layer) for index, layer in enumerate(self.layers))

    def unless_held(self, index: int, shared: Shared) -> Shared:
        """What a layer shares with others, or nothing where the layer before it was given the same.

        Each tensor given to an operator is one more output of the kernel that makes it.
        """
        held, self._now.given = self._now.given, shared
        if index and all(one is other for one, other in zip(held, shared, strict=True)):
            return _NOTHING
        return shared

    def run(self, index: int, length: int, hidden: Tensor, shared: Shared) -> Tensor:
        """One layer; `shared` as `_StandIn` names it, nothing for that of the layer before; `length`: the slots that
        attention reads.
        """
        now = self._now
        if any(one is not None for one in shared):
            now.held = shared
        tensors = hidden, *now.held
        cache = now.cache if tensors[_SLOTS] is not None else None
        kept = [None, None] if cache is None else [cache.keys[index], cache.values[index]]
        own = self._tensors[index]
        arguments = [*tensors, *kept, *own.values()]
        described = [(tuple(one.shape), one.stride(), one.dtype) if one is not None else None for one in arguments]
        key: tuple[Any, ...] = (now.compiled, self._kinds[index], length, tuple(own), *described)
        is_new = key not in self._functions
        if is_new:
            make = compiled if now.compiled else traced
            self._functions[key] = make(self._layer(index, length, cache), arguments)
        if not now.dry:
            return self._functions[key](*arguments)
        if is_new:
            nobodys = [None if one is None else torch.zeros_like(one) for one in kept]
            self._functions[key](*tensors, *nobodys, *own.values())
        return torch.zeros_like(hidden)

    def _layer(self, index: int, length: int, cache: KVCache | None) -> Callable[..., Tensor]:
        """The layer as a function of its inputs, its cache and its parameters."""
        names, num_given = list(self._tensors[index]), _NUM_GIVEN + 2

        def run(*arguments: Tensor | None) -> Tensor:
            hidden, mask, cosine, sine, slots, requests, adapted, keys, values = arguments[:num_given]
            view: LayerCache | KVCache | None = None
            if cache is not None:
                assert keys is not None
                assert values is not None
                assert slots is not None
                of_layer = LayerCache if self.splits else cache.of_layer
                view = of_layer(keys, values, slots, requests, length)
            given = {
                "attention_mask": mask,
                "position_embeddings": (cosine, sine),
                self.cache_name: view,
                "use_cache": view is not None,
            }
            parameters = dict(zip(names, arguments[num_given:], strict=True))
            with attending(view if isinstance(view, LayerCache) else None), self._gated(adapted):
                return cast(Tensor, functional_call(self.layers[index], parameters, (hidden,), given))  # type: ignore[arg-type]

        return run

    @contextmanager
    def _gated(self, adapted: Tensor | None) -> Iterator[None]:
        """Within this block the adapter's layers apply to these rows; after it to those of before."""
        if self.gate is None:
            yield
            return
        before, self.gate.rows_RQ1 = self.gate.rows_RQ1, adapted
        try:
            yield
        finally:
            self.gate.rows_RQ1 = before


class _StandIn(nn.Module):
    """Takes the place of a layer in the stock stack, and calls it as one operator."""

    def __init__(self, stack: Stack, index: int, layer: nn.Module) -> None:
        super().__init__()
        self._stack, self._index = stack, index
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor],
        **others: Any,
    ) -> Tensor:
        gate, cache = self._stack.gate, None
        for name, given in others.items():  # some classes have a name of their own for it
            if isinstance(given, KVCache):
                self._stack.cache_name, cache = name, given
        slots, requests, length = (None, None, 0) if cache is None else cache.placed
        rows = None if gate is None else gate.rows_RQ1
        shared: Shared = (attention_mask, *position_embeddings, slots, requests, rows)
        shared = self._stack.unless_held(self._index, shared)
        return _layer(hidden_states, *shared, self._stack.number, self._index, length)


@torch.library.custom_op("fewstep::layer", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _layer(
    hidden: Tensor,
    mask: Tensor | None,
    cosine: Tensor | None,
    sine: Tensor | None,
    slots: Tensor | None,
    requests: Tensor | None,
    adapted: Tensor | None,
    stack: int,
    index: int,
    length: int,
) -> Tensor:
    return _STACKS[stack].run(index, length, hidden, (mask, cosine, sine, slots, requests, adapted))


@_layer.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(hidden)


_FREE_BYTES = 2**24
"""Weights that are read in a few microseconds, which is what a product of a few rows takes at least."""


class _Either(nn.Module):
    """A linear module with a gated adapter: for rows of the gate the product with other weights, W + s B A.

    Both products are slices of one, so that an adapter adds no kernel to a pass.
    """

    def __init__(self, linear: GatedLinear) -> None:
        super().__init__()
        self.base = linear.get_base_layer()
        self.adapted = copy.deepcopy(self.base, {id(each): each for each in self.base.parameters()})
        self.adapted.weight = nn.Parameter(merged_weight(linear), requires_grad=False)
        self.gate = linear.gate

    def forward(self, x: Tensor) -> Tensor:
        out = cast(Tensor, self.base(x))
        if self.gate.rows_RQ1 is None:
            return out
        return torch.where(self.gate.rows_RQ1, cast(Tensor, self.adapted(x)), out)


def _give_each_row_its_weights(layers: nn.ModuleList) -> bool:
    """Put `_Either` in the place of every gated linear module, if these are small; whether they are."""
    found = [
        (layer, name, part) for layer in layers for name, part in layer.named_modules() if isinstance(part, GatedLinear)
    ]
    num_bytes = sum(part.get_base_layer().weight.nbytes for layer, _, part in found if layer is layers[0])
    if not 0 < num_bytes <= _FREE_BYTES:
        return False
    for layer, name, part in found:
        layer.set_submodule(name, _Either(part))
    return True


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What tells a layer's function from that of another, besides its tensors: the plain settings of its parts."""
    return tuple(
        (name, setting, value)
        for name, part in layer.named_modules()
        for setting, value in sorted(vars(part).items())
        if isinstance(value, bool | int | float | str)
    )


@dataclass
class _Product:
    """What several linear modules make of one input as a whole, while the last of them has not asked for its part."""

    whole: nn.Module
    given: Tensor | None = None
    made: Tensor | None = None
    asked: int = 0


class _Slice(nn.Module):
    """One of several linear modules that share an input: the first to be called computes the product of all."""

    def __init__(self, product: _Product, part: slice, count: int) -> None:
        super().__init__()
        if part.start == 0:  # one of them alone has its parameters, or they would be put in its place several times
            self.whole = product.whole
        self._product, self._part, self._count = product, part, count

    def forward(self, x: Tensor) -> Tensor:
        product = self._product
        if product.given is not x:
            product.given, product.made, product.asked = x, product.whole(x), 0
        product.asked += 1
        made = cast(Tensor, product.made)
        if product.asked == self._count:
            product.given = product.made = None
        return made[..., self._part]


def _sharing_an_input(network: Network) -> list[list[str]]:
    """Names, within a layer, of linear modules that are given the same tensor in its forward, several each time."""
    layer: nn.Module = network.module.base_model.layers[0]
    seen: list[tuple[Tensor, str]] = []

    def note(name: str) -> Any:
        return lambda _, arguments: seen.append((arguments[0], name))

    linear = {name: part for name, part in layer.named_modules() if type(part) in (nn.Linear, Float8Linear)}
    hooks = [part.register_forward_pre_hook(note(name)) for name, part in linear.items()]
    try:
        with torch.no_grad():
            Network.hidden(network, few_rows(network))
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[Any, list[str]] = {}
    for given, name in seen:
        groups.setdefault((id(given), type(linear[name]), linear[name].bias is None), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _fuse_products(layer: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Make the linear modules of each group slices of one product."""
    for names in groups:
        parts: list[Any] = [layer.get_submodule(name) for name in names]
        product, start = _Product(_whole(parts)), 0
        for name, part in zip(names, parts, strict=True):
            stop = start + part.out_features
            layer.set_submodule(name, _Slice(product, slice(start, stop), len(parts)))
            start = stop


def _whole(parts: Sequence[Any]) -> nn.Module:
    """One linear module in the place of several of one kind, whose parameters become views of its own."""
    whole = copy.copy(parts[0])
    whole._parameters = {
        name: None if parameter is None else _in_one([getattr(part, name) for part in parts])
        for name, parameter in parts[0]._parameters.items()
    }
    whole.out_features = sum(part.out_features for part in parts)
    return whole


def _in_one(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """One tensor of which these parameters are views, made so if they are not."""
    first = parameters[0].data
    end = first.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != end or not parameter.is_contiguous():
            break
        end += parameter.nbytes
    else:
        if end <= first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
            rows = sum(len(one) for one in parameters)
            return nn.Parameter(first.as_strided((rows, *first.shape[1:]), first.stride()), requires_grad=False)
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, own in zip(parameters, whole.split([len(one) for one in parameters]), strict=True):
        parameter.data = own
    return nn.Parameter(whole, requires_grad=False)
