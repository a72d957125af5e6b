"""Whether a network that an engine made computes what the stock one computes, tried before it is used."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewstep.models.cache import KVCache
from fewstep.models.network import Network, Plan

_NUM_TRIED = 16
"""Rows by which networks are compared: enough for packed weights."""


def few_rows(network: Network) -> Plan:
    """An uncached forward of a few tokens, the last of which those before do not see; half of them are adapted."""
    device = network.device
    row_1Q = torch.arange(_NUM_TRIED, device=device)[None]
    context_length_1 = torch.tensor([_NUM_TRIED - 2], device=device)
    return Plan(
        kind="few rows",
        tokens_RQ=row_1Q % network.vocab_size,
        positions_RQ=row_1Q,
        blocks_RQ=network.role.blocks(row_1Q, context_length_1[:, None]),
        slots_RQ=None,
        scored_RS=row_1Q,
        context_length_R=context_length_1,
        adapted_RQ=None if network.adapter is None else row_1Q >= _NUM_TRIED // 2,
    )


def difference(ours: Network, theirs: Network) -> float:
    """How far the rows of one network are from the other's after the final norm, as a part of them: the larger of a
    forward without a cache and one with it.
    """
    with torch.no_grad():
        found, expected = (
            torch.stack([each.hidden(plan, cache) for plan, cache in _forwards(each, theirs)]).float()
            for each in (ours, theirs)
        )
        return float(((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


def difference_of_layers(ours: Network, theirs: Network) -> float:
    """How far what a layer adds to its rows is from what the other's layer adds to the same rows, as a part of it: the
    largest of all layers, without a cache and with it.

    Each layer is given the rows of `theirs`, since deep networks enlarge what was rounded otherwise in their first
    layers. What their own numbers cannot tell apart is not counted.
    """
    rounding = torch.finfo(theirs.dtype).eps
    largest = 0.0
    with torch.no_grad():
        for (plan, our_cache), (_, their_cache) in zip(_forwards(ours, theirs), _forwards(theirs, theirs), strict=True):
            given, expected = _rows_of_layers(theirs, plan, their_cache)
            _, found = _rows_of_layers(ours, plan, our_cache, given)
            for before, after, other in zip(given, expected, found, strict=True):
                error = max(0.0, float((other - after).norm() - rounding * after.norm()))
                largest = max(largest, error / float((after - before).norm()))
    return largest


def _forwards(network: Network, tried_on: Network) -> list[tuple[Plan, KVCache | None]]:
    """A forward without a cache and one with it."""
    plan = few_rows(tried_on)
    cached = replace(plan, slots_RQ=plan.positions_RQ)
    return [(plan, None), (cached, network.new_cache(1, 2 * _NUM_TRIED))]


def _rows_of_layers(
    network: Network, plan: Plan, cache: KVCache | None, given: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows that each layer is given, and those that it makes of them; `given`: others in their place."""
    before, after, handles = list[Tensor](), list[Tensor](), list[RemovableHandle]()

    def on_entry(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        rows = arguments[0] if arguments else named["hidden_states"]
        rows = rows if given is None else given[len(before)].to(rows.dtype)
        before.append(rows.float())
        return ((rows, *arguments[1:]), named) if arguments else (arguments, {**named, "hidden_states": rows})

    def on_exit(layer: nn.Module, arguments: tuple[Any, ...], made: Any) -> None:
        after.append((made[0] if isinstance(made, tuple) else made).float())

    for layer in network.module.base_model.layers:
        handles += [
            layer.register_forward_pre_hook(on_entry, with_kwargs=True),
            layer.register_forward_hook(on_exit),
        ]
    try:
        network.hidden(plan, cache)
    finally:
        for handle in handles:
            handle.remove()
    return before, after
