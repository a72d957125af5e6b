"""Weights in 8 bits: nearly the same rows, refusals in a sentence."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.networks import lively, with_random_adapter

import fewstep
from fewstep.decode.requests import Output
from fewstep.engine.parity import difference_of_layers, few_rows
from fewstep.engine.stack import fused
from fewstep.errors import FewstepError
from fewstep.measure.roofline import Sizes
from fewstep.models.load import save_network, weights_hash
from fewstep.models.quantize import Float8Linear, quantize, to_float8
from fewstep.models.tiny import tiny_network


def test_answers_in_int8_come_from_the_plain_path_and_rounded_weights(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    save_network(lively("block_causal"), tmp_path / "student")
    lm, rounded = (fewstep.load(tmp_path / "student", device="cpu", quantize=kind) for kind in (None, "int8"))
    before, after = (one.network.module.base_model.layers[0].mlp.up_proj.weight.detach() for one in (lm, rounded))
    difference = (after.dequantize() - before).norm() / before.norm()
    assert 0 < float(difference) < 0.01
    assert rounded.choice().note == "weights in int8 are multiplied by the plain path"
    assert weights_hash(rounded.network) != weights_hash(lm.network)
    assert isinstance(rounded.generate("what is 2+2?", max_new_tokens=8), Output)


def test_what_cannot_be_in_int8_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewstepError, match="unknown quantize 'int3'; choose int8, fp8"):
        fewstep.load("gsm-student", device="cpu", quantize="int3")
    with pytest.raises(FewstepError, match=r"the gated adapter .* leave out quantize int8"):
        quantize(with_random_adapter(4), "int8")
    network = lively("block_causal")
    network.module.to("meta")
    with pytest.raises(FewstepError, match="quantize int8 is for a CPU"):
        quantize(network, "int8")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(FewstepError, match=r"pip install 'fewstep\[quantize\]'"):
        quantize(lively("block_causal"), "int8")


def test_a_linear_module_in_float8_gives_nearly_its_rows() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).to(torch.bfloat16)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16) * torch.logspace(-3, 3, 5)[None, :, None].bfloat16()
    rounded = Float8Linear.of(linear)
    expected, found = linear(x).detach().float(), rounded(x).detach().float()
    assert rounded.weight.dtype == torch.float8_e4m3fn
    assert found.shape == expected.shape
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < float(errors.max()) < 0.05  # small rows are rounded as finely as large ones


def test_layers_in_float8_are_fused_and_give_the_same_rows() -> None:
    network = tiny_network("block_causal")
    network.module.to(torch.bfloat16)
    whole = Sizes.of(network.module).weight_bytes
    before = network.hidden(few_rows(network)).detach().float()
    to_float8(network.module)
    kinds = [type(part) for part in network.module.modules()]
    assert kinds.count(Float8Linear) == 7 * network.module.config.num_hidden_layers
    rounded = network.hidden(few_rows(network)).detach().float()
    assert 0 < float((rounded - before).norm() / before.norm()) < 0.1
    assert difference_of_layers(fused(network), network) < 0.02
    assert Sizes.of(network.module).weight_bytes < whole


def test_what_cannot_be_in_float8_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FewstepError, match=r"quantize fp8 is for a GPU, and .* is on cpu; leave it out, or load on cuda"
    ):
        quantize(lively("block_causal"), "fp8")
    monkeypatch.setattr("fewstep.models.quantize.DEVICES", {"fp8": "cpu"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(FewstepError, match=r"needs a GPU that multiplies float8 .* has 8\.0; leave it out"):
        quantize(lively("block_causal"), "fp8")


def test_a_plain_network_is_hashed_as_before() -> None:
    network = lively("block_causal")
    assert weights_hash(network) == weights_hash(network)
    assert network.quantized is None
    assert all(type(one) in (torch.Tensor, torch.nn.Parameter) for one in network.module.state_dict().values())
