"""Weights in 8 bits, for networks that are to take less memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fewstep.errors import FewstepError
from fewstep.models.network import Network

KINDS = ("int8",)


def quantize(network: Network, kind: str) -> None:
    """Round the weights of the layers' linear modules to int8, in place, each row with a scale of its own (torchao).

    Rows, embeddings and head stay as they are. FewstepError for another kind, for a GPU, for a network with a gated
    adapter, or without torchao.
    """
    if kind not in KINDS:
        raise FewstepError(f"unknown quantize {kind!r}; choose {', '.join(KINDS)}")
    if network.device.type != "cpu":
        raise FewstepError(
            f"quantize {kind} is for a CPU, and {network.name} is on {network.device.type}; leave it out, or load on "
            "the cpu"
        )
    if network.adapter is not None:
        raise FewstepError(
            f"the gated adapter {network.name} belongs to weights that are not rounded; leave out quantize {kind}"
        )
    with _without_its_notes():
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise FewstepError(
                f"quantize {kind} needs torchao, which is not there ({error}); install it with: "
                "pip install 'fewstep[quantize]'"
            ) from error
        head = network.module.get_output_embeddings()

        def is_of_a_layer(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and module is not head

        quantize_(network.module, Int8WeightOnlyConfig(), filter_fn=is_of_a_layer)
    network.quantized, network.may_round = kind, False


@contextmanager
def _without_its_notes() -> Iterator[None]:
    """torchao notes at import which of its libraries for GPUs are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
