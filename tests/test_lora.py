"""Adapters: computed on the weights they are PEFT's own, and what is saved is complete and written once."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network
from fewstep.train.lora import LoRASettings, add_lora, save_trained


def with_adapter(rank: int) -> tuple[Network, PeftModel]:
    network = tiny_network("autoregressive")
    model = add_lora(network, LoRASettings(rank=rank, alpha=2.0))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return network, model


def as_peft_computes_it(model: PeftModel) -> None:
    """Put PEFT's own layers back."""
    for layer in model.modules():
        if type(layer).__name__ == "_MergedLinear":
            layer.__class__ = type(layer).__mro__[1]


def test_an_adapter_on_the_weights_gives_the_outputs_and_gradients_of_one_on_the_rows():
    found = []
    for merged in (True, False):
        _, model = with_adapter(rank=8)
        kinds = {type(layer).__name__ for layer in model.modules() if hasattr(layer, "lora_A")}
        assert kinds == {"_MergedLinear"}
        if not merged:
            as_peft_computes_it(model)
        logits = model(torch.tensor([[3, 9, 4, 20, 21]])).logits
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (logits, gradients), (expected, expected_gradients) = found
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert gradients
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_a_disabled_adapter_changes_nothing_and_a_merged_one_counts_once():
    _, model = with_adapter(rank=8)
    ids = torch.tensor([[3, 9, 4, 20, 21]])
    plain, adapted = tiny_network("autoregressive").module(ids).logits, model(ids).logits
    assert (plain - adapted).abs().max() > 1e-3
    with model.disable_adapter():
        assert_close(model(ids).logits, plain)
    model.merge_adapter()
    assert_close(model(ids).logits, adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [LoRASettings(rank=1), LoRASettings(rank=8, dropout=0.1)])
def test_a_small_rank_and_dropout_are_computed_on_the_rows(settings):
    model = add_lora(tiny_network("autoregressive", hidden=64), settings)
    assert {type(layer).__name__ for layer in model.modules() if hasattr(layer, "lora_A")} == {"Linear"}


def test_tied_weights_are_written_once(tmp_path):
    network = tiny_network("autoregressive")
    network.module.config.tie_word_embeddings = True
    network.module.tie_weights()
    head, embeddings = network.module.get_output_embeddings(), network.module.get_input_embeddings()
    assert head.weight is embeddings.weight
    save_trained(network, network.module, tmp_path, dtype=torch.bfloat16, base="", home=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert sum("embed_tokens" in name or "lm_head" in name for name in load_file(file)) == 1
    again = load_network(tmp_path, dtype="float32")
    assert again.module.get_output_embeddings().weight is again.module.get_input_embeddings().weight
