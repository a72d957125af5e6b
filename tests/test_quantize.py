"""Weights in int8: nearly the same rows, refusals in a sentence."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.networks import lively, with_random_adapter

import fewstep
from fewstep.decode.requests import Output
from fewstep.errors import FewstepError
from fewstep.models.load import save_network, weights_hash
from fewstep.models.quantize import quantize


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
    with pytest.raises(FewstepError, match="unknown quantize 'int3'; choose int8"):
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


def test_a_plain_network_is_hashed_as_before() -> None:
    network = lively("block_causal")
    assert weights_hash(network) == weights_hash(network)
    assert network.quantized is None
    assert all(type(one) in (torch.Tensor, torch.nn.Parameter) for one in network.module.state_dict().values())
