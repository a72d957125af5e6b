"""Operations of a training step, counted from what its forwards are made of.

Axes: R = rows, T = positions of a row, S = scored positions.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fewstep.models.masks import Layout
from fewstep.models.network import Network
from fewstep.models.noise_conditioning import NoisyRows
from fewstep.train.documents import WeightsOf
from fewstep.train.objectives import Objective, to_device
from fewstep.train.stream import BatchStream

FORMULA = (
    "6 x non-embedding parameters per real token + 6 x vocabulary x width per scored position + 12 x layers x width x "
    "mean visible keys per real token"
)
LORA_FORMULA = (
    "useful operations: as above with 4 instead of 6 for frozen weights, whose gradient nobody needs (an adapter "
    "computed on the weights forms it all the same), and 6 for the adapter's"
)


@dataclass
class Work:
    """What packed forwards are made of."""

    real_tokens: int = 0
    scored: int = 0
    visible_keys: int = 0


def count_work(
    objective: Objective, vocab_size: int, *, rows: int, row_length: int, device: torch.device, batches: int
) -> tuple[Work, Work]:
    """The work with gradient and that without, of the first batches, replayed with a forward that only counts."""
    stream = BatchStream(objective, rows=rows, row_length=row_length)
    counted = {True: Work(), False: Work()}
    for number in range(batches):
        batch = stream.next_batch()
        real_RT = batch.packed.real_RT.to(device)

        def forward(
            tokens_RT: Tensor,
            positions_RT: Tensor,
            layout: Layout,
            rows_S: Tensor,
            adapted_RT: Tensor | None = None,
            *,
            gradient: bool = True,
            noisy: NoisyRows | None = None,
            weights: WeightsOf = "own",
            real_RT: Tensor = real_RT,
        ) -> Tensor:
            work = counted[gradient]
            work.real_tokens += int(real_RT.sum())
            work.scored += len(rows_S)
            for row in range(len(tokens_RT)):  # one at a time: a dense mask of all rows is large
                work.visible_keys += int(_packed_row(layout, row).dense()[0, 0][real_RT[row]].sum())
            return torch.zeros(len(rows_S), vocab_size, device=device, requires_grad=gradient)

        objective.loss(forward, to_device(objective.prepare(batch, torch.Generator().manual_seed(number)), device))
    return counted[True], counted[False]


def flops_per_token(network: Network, work: tuple[Work, Work], *, adapter_parameters: int = 0) -> float:
    """Operations of a training step for each real token, by FORMULA.

    A forward without gradient counts a third: 2 instead of 6, 4 instead of 12. With an adapter, LORA_FORMULA: frozen
    weights and the frozen head take 4, since their own gradient is never formed; attention stays 12.
    """
    config = network.module.config
    embedding, head = network.module.get_input_embeddings().weight, network.module.get_output_embeddings().weight
    weights = network.num_parameters - embedding.numel() * (1 if head is embedding else 2)

    def flops(one: Work, per_weight: int, per_adapter: int) -> int:
        of_tokens = (per_weight * weights + per_adapter * adapter_parameters) * one.real_tokens
        of_head = per_weight * config.vocab_size * config.hidden_size * one.scored
        return of_tokens + of_head + 2 * per_adapter * config.num_hidden_layers * config.hidden_size * one.visible_keys

    with_gradient, without = work
    total = flops(with_gradient, 4 if adapter_parameters else 6, 6) + flops(without, 2, 2)
    return total / with_gradient.real_tokens


def _packed_row(layout: Layout, row: int) -> Layout:
    """One packed row of a layout."""
    parts = {field.name: getattr(layout, field.name) for field in fields(Layout)}
    return replace(layout, **{name: part[row : row + 1] for name, part in parts.items() if part is not None})
