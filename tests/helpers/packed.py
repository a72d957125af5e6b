"""Packed batches of an objective, the network as objectives call it, and plain unpacked forwards to compare with."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.models.masks import Layout
from fewstep.models.network import Network, Plan
from fewstep.train.documents import Batch
from fewstep.train.objectives import Objective
from fewstep.train.packing import best_fit, pack


def batch_of(
    objective: Objective, order: Sequence[int] | None = None, *, num_rows: int = 2, row_length: int = 40
) -> Batch:
    """These examples, all of them by default, in packed rows; they must fit."""
    chosen = np.array(range(objective.num_examples) if order is None else order)
    lengths = objective.segment_lengths(chosen, np.random.default_rng(0))
    starts = best_fit(lengths.sum(1), num_rows, row_length)
    assert len(starts) == len(chosen)
    in_place = starts.argsort()
    segments = torch.from_numpy(lengths[in_place])
    packed = pack(torch.from_numpy(starts[in_place]), segments, num_rows, row_length)
    return Batch(torch.from_numpy(chosen[in_place]), segments, packed)


def forward_of(network: Network, calls: list[Any] | None = None) -> Callable[..., Tensor]:
    """The network as objectives call it, dense and in evaluation mode; `calls` collects the arguments."""

    def forward(
        tokens_RT: Tensor,
        positions_RT: Tensor,
        layout: Layout,
        rows_S: Tensor,
        adapted_RT: Tensor | None = None,
        *,
        gradient: bool = True,
    ) -> Tensor:
        if calls is not None:
            calls.append((tokens_RT, positions_RT, layout, rows_S))
        hidden = network.module.base_model(
            input_ids=tokens_RT, attention_mask=layout.dense(), position_ids=positions_RT, use_cache=False
        ).last_hidden_state
        logits = network.module.get_output_embeddings()(hidden.flatten(0, 1)[rows_S])
        return logits if gradient else logits.detach()

    return forward


def unpacked_logits(network: Network, tokens: list[int], context: int = 0) -> Tensor:
    """Logits [T, V] of one plain uncached forward in the network's role."""
    positions = torch.arange(len(tokens))[None]
    blocks = network.role.blocks(positions, torch.tensor([[context]]))
    hidden = network.hidden(Plan("full", torch.tensor([tokens]), positions, blocks, None, positions))
    return network.module.get_output_embeddings()(hidden)[0]
