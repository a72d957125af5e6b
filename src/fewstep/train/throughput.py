"""How fast the trainer trains: real tokens a second of an objective, and the operations that they take."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from fewstep.models.network import Network
from fewstep.train.lora import LoRASettings
from fewstep.train.objectives import Objective
from fewstep.train.operations import FORMULA, LORA_FORMULA, count_work, flops_per_token
from fewstep.train.trainer import TrainSettings, train

_COUNTED_BATCHES = 4
"""Batches whose work is counted."""


def measure_training(
    network: Network, objective: Objective, settings: TrainSettings, lora: LoRASettings | None = None
) -> dict[str, Any]:
    """Train by the trainer itself, and throw the result away: figures by name.

    Tokens per second are the median of the windows that are logged, the first (which compiles) left out; operations are
    those of `flops_per_token`, by the `formula` that is told.
    """
    shape = {"rows": settings.rows, "row_length": settings.row_length}
    num_parameters, adapter = network.num_parameters, _adapter_parameters(network.module, lora)
    work = count_work(objective, network.vocab_size, **shape, device=network.device, batches=_COUNTED_BATCHES)
    per_token = flops_per_token(network, work, adapter_parameters=adapter)
    with tempfile.TemporaryDirectory() as folder:
        done = train(network, objective, settings, Path(folder) / "model", lora=lora)
    rates = [line["tokens_per_second"] for line in done.history if "tokens_per_second" in line]
    counted, without_gradient = work
    return {
        "parameters": num_parameters,
        "adapter_parameters": adapter,
        **shape,
        "packing": counted.real_tokens / (_COUNTED_BATCHES * settings.rows * settings.row_length),
        "mean_visible_keys": counted.visible_keys / counted.real_tokens,
        "scored_share": counted.scored / counted.real_tokens,
        "forward_without_gradient_share": without_gradient.real_tokens / counted.real_tokens,
        "real_tokens_per_second": statistics.median(rates[1:] or rates),
        "flops_per_real_token": per_token,
        "formula": LORA_FORMULA if lora else FORMULA,
    }


def _adapter_parameters(module: Any, lora: LoRASettings | None) -> int:
    """Those that the adapter will have: rank x (in + out) for every linear layer but the head."""
    if lora is None:
        return 0
    head = module.get_output_embeddings()
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer is not head]
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)
