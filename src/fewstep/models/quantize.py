"""Weights in 8 bits: in int8 for networks that are to take less memory, in float8 for GPUs that multiply such numbers.

Axes: N = outputs of a linear module, K = its inputs.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.models.network import Network

DEVICES = {"int8": "cpu", "fp8": "cuda"}
"""Kind -> the type of device that it is for."""

KINDS = tuple(DEVICES)

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
_MULTIPLE = 16
"""Products in float8 have so many inputs and outputs, or a multiple of them."""


def quantize(network: Network, kind: str) -> None:
    """Round the weights of the layers' linear modules to 8 bits, in place, each row with a scale of its own.

    "int8" is for a CPU: rows of a forward stay as they are (torchao). "fp8" is for a GPU that multiplies float8 (NVIDIA
    since compute capability 8.9): the rows of a forward are rounded too, see `Float8Linear`. Embeddings and head stay
    as they are. FewstepError for another kind, for another device than the kind's, for a network with a gated adapter,
    or for int8 without torchao.
    """
    if kind not in KINDS:
        raise FewstepError(f"unknown quantize {kind!r}; choose {', '.join(KINDS)}")
    device = network.device
    if device.type != DEVICES[kind]:
        raise FewstepError(
            f"quantize {kind} is for a {_NAMES[DEVICES[kind]]}, and {network.name} is on {device.type}; leave it out, "
            f"or load on {DEVICES[kind]}"
        )
    if network.adapter is not None:
        raise FewstepError(
            f"the gated adapter {network.name} belongs to weights that are not rounded; leave out quantize {kind}"
        )
    if kind == "fp8":
        _check_multiplies_float8(network)
        to_float8(network.module)
    else:
        _to_int8(network.module)
    network.quantized, network.may_round = kind, False


_NAMES = {"cpu": "CPU", "cuda": "GPU"}


class Float8Linear(nn.Module):
    """A linear module whose weight [N, K] is in float8 (e4m3), a scale for each row; so are its inputs, as they come.

    Scales are applied to the product, which then runs as fast as one without them: cuBLAS's own products with a scale
    for each row take up to 1.7 times as long for the few rows of a pass. What comes out is in the numbers of the input.
    """

    def __init__(self, weight_NK: Tensor, scale_N: Tensor, bias_N: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_NK, requires_grad=False)
        self.scale = nn.Parameter(scale_N, requires_grad=False)
        self.bias = bias_N
        self.out_features, self.in_features = weight_NK.shape

    @classmethod
    def of(cls, linear: nn.Linear) -> "Float8Linear":
        weight_NK, scale_N1 = _rounded(linear.weight.detach())
        return cls(weight_NK, scale_N1[:, 0], linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows_MK, scale_M1 = _rounded(x.reshape(-1, self.in_features))
        one = scale_M1.new_ones(())
        product_MN = torch._scaled_mm(
            rows_MK, self.weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        made_MN = product_MN.float() * scale_M1 * self.scale
        if self.bias is not None:
            made_MN = made_MN + self.bias
        return made_MN.to(x.dtype).view(*x.shape[:-1], self.out_features)


def _rounded(rows_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8, and the scale [M, 1] in float32 that gives them back."""
    rows_MK = rows_MK.float()
    scale_M1 = rows_MK.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return (rows_MK / scale_M1).to(_FLOAT8), scale_M1


def to_float8(module: nn.Module) -> None:
    """Every linear module but the head becomes a `Float8Linear`, if float8 has products of its size."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    for name, part in list(module.named_modules()):
        fits = type(part) is nn.Linear and part.in_features % _MULTIPLE == 0 and part.out_features % _MULTIPLE == 0
        if fits and part is not head:
            module.set_submodule(name, Float8Linear.of(part))


def _check_multiplies_float8(network: Network) -> None:
    capability = torch.cuda.get_device_capability(network.device)
    if capability < (8, 9):
        raise FewstepError(
            f"quantize fp8 needs a GPU that multiplies float8 (compute capability 8.9 or later), and {network.device} "
            f"has {capability[0]}.{capability[1]}; leave it out"
        )


def _to_int8(module: nn.Module) -> None:
    with _without_its_notes():
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise FewstepError(
                f"quantize int8 needs torchao, which is not there ({error}); install it with: "
                "pip install 'fewstep[quantize]'"
            ) from error
        head = module.get_output_embeddings()  # type: ignore[operator]

        def is_of_a_layer(part: nn.Module, name: str) -> bool:
            return isinstance(part, nn.Linear) and part is not head

        quantize_(module, Int8WeightOnlyConfig(), filter_fn=is_of_a_layer)


@contextmanager
def _without_its_notes() -> Iterator[None]:
    """torchao notes at import which of its libraries for GPUs are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
