"""Adapters as PEFT leaves them: merged they compute what PEFT computes, or one sentence says why they cannot be."""

import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fewstep.errors import FewstepError
from fewstep.models import load
from fewstep.models.load import load_network, save_network
from fewstep.models.tiny import tiny_network, tiny_tokenizer

IDS = torch.tensor([[10, 11, 12, 13, 14, 20]])


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **settings})


def write_adapter(folder: Path, config: Any, *, tied: bool = False, new_tokens: int = 0, **saving: Any) -> torch.Tensor:
    """A base and an adapter of it, nothing beside the adapter that PEFT does not write; PEFT's logits [Q, V]."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    settings = json.loads((folder / "base/config.json").read_text())
    role = {"role": "autoregressive", "mask_token_id": 2, "block_size": 8}
    (folder / "base/config.json").write_text(json.dumps({**settings, **role}))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if new_tokens:
            base.resize_token_embeddings(64 + new_tokens)
        model = peft.get_peft_model(base, config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        with torch.no_grad():
            logits = model(IDS).logits[0]
        model.save_pretrained(folder / "adapter", **saving)
    return logits


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (lora(), {}),
        (lora(target_modules="all-linear"), {}),
        (lora(target_modules=r".*\.(q|v)_proj", rank_pattern={r"model\.layers\.0\..*q_proj": 2, "v_proj": 3}), {}),
        (lora(target_modules=["q_proj", "lm_head"]), {}),
        (lora(target_modules=["q_proj", "embed_tokens"]), {}),
        (lora(target_modules=["q_proj", "lm_head"]), {"tied": True}),
        (lora(target_modules=["q_proj", "embed_tokens"]), {"tied": True}),
        (lora(modules_to_save=["lm_head"]), {"tied": True}),
        (lora(trainable_token_indices=[5, 6]), {}),
        (lora(), {"save_embedding_layers": True}),
        (lora(), {"save_embedding_layers": True, "tied": True}),
        (lora(), {"new_tokens": 4}),
        (lora(target_modules=["q_proj", "lm_head", "embed_tokens"]), {"new_tokens": 4}),
        (lora(modules_to_save=["embed_tokens", "lm_head"]), {"new_tokens": 4}),
        (lora(use_dora=True), {}),
        (lora(use_rslora=True, bias="all"), {}),
        (peft.IA3Config(task_type="CAUSAL_LM"), {}),
        (peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), {}),
        (peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), {}),
        (peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, oft_block_size=0), {}),
        (peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4), {}),
        (peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10), {}),
    ],
)
def test_an_adapter_alone_computes_what_peft_computes_with_the_role_of_its_base(
    config: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    expected_QV = write_adapter(tmp_path, config, **options)
    assert not (tmp_path / "adapter/config.json").exists()
    network = load_network(tmp_path / "adapter", dtype="float32", device="cpu")
    assert (network.role.name, network.role.block_size) == ("autoregressive", 8)
    save_network(network, tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        for module in (network.module, stock):
            torch.testing.assert_close(module(IDS).logits[0], expected_QV, atol=1e-4, rtol=1e-4)


def test_merged_in_float64_weights_are_the_exact_sums_rounded_once(tmp_path: Path) -> None:
    """So that they do not depend on the order in which a machine adds up."""
    write_adapter(tmp_path, lora(lora_alpha=3))
    base = dict(load_network(tmp_path / "base", dtype="float32", device="cpu").module.named_parameters())
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = load_network(tmp_path / "adapter", dtype="bfloat16", device="cpu", merged_in=torch.float64)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    changed = 0
    for name, weight in merged.module.named_parameters():
        a, b = (adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
        expected = base[name].double()
        if a is not None and b is not None:
            expected = expected + settings["lora_alpha"] / settings["r"] * (b.double() @ a.double())
            changed += 1
        assert torch.equal(weight, expected.bfloat16()), name
    assert changed > 0


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder / "adapter"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base_model_name_or_path": None}, "does not say which model the adapter belongs to"),
        ({"base_model_name_or_path": "/nowhere/model"}, "which is not there"),
        ({"base_model_name_or_path": "."}, "names the adapter itself"),
        ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING', which cannot be merged"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "p.bin"}, "cannot be merged"),
        ({"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"}, "sets megatron_config"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"target_modules": r"(\w+\.?)+!"}, "the base has no such module"),
        ({"layers_to_transform": [0], "layers_pattern": r"(\w+\.?)+!"}, "layers_pattern that is no name"),
        ({"target_modules": "("}, r"adapter_config\.json cannot be read"),
        ({"r": 3}, "do not fit"),
        ({"r": "x"}, "cannot be read|do not fit"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path, lora())
    started = time.monotonic()
    with pytest.raises(FewstepError, match=sentence):
        load_network(edited(tmp_path, **changes), device="cpu")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_patterns_have_a_limit_of_time(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, lora())
    monkeypatch.setattr("fewstep.models.adapters.REGEX_SECONDS", -1)
    value = {"(a+)+": 3} if field.endswith("pattern") else "(a+)+"
    with pytest.raises(FewstepError, match="has a pattern that takes longer than"):
        load_network(edited(tmp_path, **{field: value}), device="cpu")


def test_what_only_training_needed_is_not_followed(tmp_path: Path) -> None:
    write_adapter(tmp_path, lora())
    odd = {"megatron_core": "megatron.evil", "auto_mapping": {"parent_library": "os"}, "revision": "x", "unheard_of": 1}
    odd |= {"exclude_modules": r"(\w+\.?)+!", "alpha_pattern": {r"(\w+\.?)+!": 3}}  # which match nothing, in years
    load_network(edited(tmp_path, **odd), device="cpu")


def test_an_adapter_from_the_hub_finds_its_base_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, lora())
    edited(tmp_path, base_model_name_or_path="some/base")
    hub = {"some/base": tmp_path / "base", "some/adapter": tmp_path / "adapter"}
    monkeypatch.setattr(load, "hub_folder", hub.__getitem__)
    assert load_network("some/adapter", device="cpu").name == "some/adapter"


def test_a_folder_beside_a_whole_file_of_weights_may_hold_an_old_index(tmp_path: Path) -> None:
    save_network(tiny_network(), tmp_path / "model")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    load_network(tmp_path / "model", device="cpu")


def test_pipes_and_git_lfs_pointers_are_told_by_name(tmp_path: Path) -> None:
    import os

    save_network(tiny_network(), tmp_path / "model")
    for file in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json"):
        for kind in ("pipe", "pointer"):
            folder = tmp_path / f"{kind}-{file}"
            shutil.copytree(tmp_path / "model", folder)
            (folder / file).unlink(missing_ok=True)
            if kind == "pipe":
                os.mkfifo(folder / file)
            else:
                (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n")
            with pytest.raises(FewstepError, match=rf"{file} is a (pipe|git-lfs pointer)"):
                load_network(folder, device="cpu")
