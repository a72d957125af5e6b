"""Whether a network that an engine made computes what the stock one computes, tried before it is used."""

from dataclasses import replace

import torch

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
    plan = few_rows(theirs)
    cached = replace(plan, slots_RQ=plan.positions_RQ)
    with torch.no_grad():
        found, expected = (
            torch.stack([each.hidden(plan), each.hidden(cached, each.new_cache(1, 2 * _NUM_TRIED))]).float()
            for each in (ours, theirs)
        )
        return float(((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())
