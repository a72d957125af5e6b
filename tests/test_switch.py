"""One set of weights in several roles: adapters beside the weights of a loaded model share all its parameters."""

import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.models.load import load_network, save_network
from fewstep.models.network import Network, added_bytes
from fewstep.models.roles import RoleName
from fewstep.models.tiny import tiny_network
from fewstep.train.lora import LoRASettings, add_gated_lora, save_trained

PROMPTS = ["1 + 2 = ", "what is 7 * 8?"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 16}


def save_adapter(base: str, folder: Path, role: RoleName | None = None) -> None:
    """A random adapter, in another role if one is given."""
    network = load_network(folder.parent / base)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(folder.name))
        trained = get_peft_model(network.module, config)
    played = network if role is None else Network(network.module, network.role.playing(role), network.tokenizer)
    folder.mkdir()
    save_trained(played, trained, folder, dtype=torch.float32, base=str(folder.parent / base), home=folder)


def save_gated(base: str, folder: Path) -> None:
    network = add_gated_lora(load_network(folder.parent / base), LoRASettings(rank=2), block_size=4)
    assert network.adapter is not None
    folder.mkdir()
    save_trained(network, network.adapter, folder, dtype=torch.float32, base=str(folder.parent / base), home=folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal base with the adapters `cllm` and `draft`, a teacher with the adapter `student`, a causal stranger."""
    folder = tmp_path_factory.mktemp("switch")
    shape: dict[str, Any] = {"seed": 2, "head_scale": 30.0, "right_shift_logits": True}
    save_network(tiny_network("autoregressive", head_scale=30.0), folder / "base")
    save_network(tiny_network("bidirectional", **shape), folder / "teacher")
    save_network(tiny_network("autoregressive", head_scale=30.0, seed=1), folder / "stranger")
    save_adapter("base", folder / "cllm")
    save_adapter("teacher", folder / "student", "block_causal")
    save_adapter("stranger", folder / "other")
    save_gated("base", folder / "draft")
    return folder


def tokens(lm: LanguageModel) -> list[list[int]]:
    return [output.token_ids for output in lm.generate(PROMPTS, **SETTINGS)]


def places(network: Network) -> set[int]:
    """Where in memory its parameters and buffers lie."""
    return {tensor.data_ptr() for tensor in [*network.module.parameters(), *network.module.buffers()]}


@pytest.mark.parametrize(("base", "adapter"), [("base", "cllm"), ("teacher", "student"), ("base", "draft")])
def test_an_adapted_model_shares_every_parameter_and_answers_as_if_loaded_alone(
    folders: Path, base: str, adapter: str
) -> None:
    lm = load(folders / base)
    before, own = tokens(lm), places(lm.network)
    bits = {name: tensor.clone() for name, tensor in lm.network.module.state_dict().items()}
    adapted, alone = lm.with_adapter(folders / adapter), load(folders / adapter)
    assert own <= places(adapted.network)
    added = [one for one in adapted.network.module.parameters() if one.data_ptr() not in own]
    assert sum(one.numel() for one in added) < 0.2 * lm.network.num_parameters
    assert tokens(adapted) == tokens(alone)
    assert (adapted.role, adapted.network.name) == (
        alone.role,
        alone.network.name if adapter != "draft" else str(folders / base),
    )
    assert tokens(lm) == before  # also after and between
    assert tokens(adapted) == tokens(alone)
    assert adapted.with_adapter(None).network is lm.network
    after = lm.network.module.state_dict()
    assert bits.keys() == after.keys()
    assert all(torch.equal(bits[name], after[name]) for name in bits)


def test_one_loaded_model_plays_all_its_roles_in_turn_whichever_it_has(folders: Path) -> None:
    lm = load(folders / "draft")
    cllm = lm.with_adapter(folders / "cllm")  # of the base, not beside the first adapter
    assert tokens(cllm) == tokens(load(folders / "cllm"))
    assert tokens(cllm.with_adapter(folders / "draft")) == tokens(lm) == tokens(cllm.with_adapter(None))
    assert cllm.network.base is lm.network.base is not None
    assert cllm.with_adapter(None).network is lm.network.base


def test_switching_leaves_alone_what_learns(folders: Path) -> None:
    lm = load(folders / "base")
    lm.network.module.requires_grad_(True)
    adapted = lm.with_adapter(folders / "cllm")
    assert all(parameter.requires_grad for parameter in lm.network.module.parameters())
    assert not any(
        parameter.requires_grad for name, parameter in adapted.network.module.named_parameters() if "lora" in name
    )


@pytest.mark.parametrize(
    ("base", "adapter", "sentence"),
    [
        ("base", "other", r"adapter .*other belongs to .*stranger, and .*base has other weights; load that model"),
        ("teacher", "cllm", r"adapter .*cllm belongs to .*base, and .*teacher has other weights"),
        ("stranger", "draft", r"gated adapter .*draft belongs to other weights than its base has"),
        ("teacher", "draft", r"drafts for a causal network, and .*teacher has the role bidirectional"),
        ("base", "teacher", r"teacher is no adapter but a model of its own; load it$"),
        ("base", "nowhere", r"no model"),
    ],
)
def test_what_cannot_be_switched_to_is_refused_in_a_sentence(
    folders: Path, base: str, adapter: str, sentence: str
) -> None:
    lm = load(folders / base)
    before = tokens(lm)
    with pytest.raises(FewstepError, match=sentence):
        lm.with_adapter(folders / adapter)
    assert tokens(lm) == before


def test_an_adapter_that_changes_the_embeddings_or_lacks_a_tensor_is_refused(folders: Path, tmp_path: Path) -> None:
    for name in ("base", "cllm"):
        (tmp_path / name).mkdir()
        for file in (folders / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "cllm" / "adapter_model.safetensors"
    kept = load_file(weights)
    lm = load(tmp_path / "base")
    table = lm.network.module.get_input_embeddings().weight
    key = "base_model.model.model.embed_tokens.weight"
    save_file({**kept, key: table.detach().clone()}, weights, metadata={"format": "pt"})
    with pytest.raises(FewstepError, match=r"changes the embeddings .* load it as a model of its own"):
        lm.with_adapter(tmp_path / "cllm")
    save_file(dict(list(kept.items())[1:]), weights, metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FewstepError, match="missing or left over"):
            lm.with_adapter(tmp_path / "cllm")


@pytest.mark.parametrize("adapter", ["cllm", "draft", "damaged", "other"])
def test_which_parameters_of_the_base_learn_stays_also_if_an_adapter_is_refused(
    folders: Path, tmp_path: Path, adapter: str
) -> None:
    for name in ("base", "cllm"):
        shutil.copytree(folders / name, tmp_path / ("damaged" if name == "cllm" else name))
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    save_file(dict(list(load_file(weights).items())[1:]), weights, metadata={"format": "pt"})
    lm = load(folders / "base")
    parameters = list(lm.network.module.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i % 2 == 0)
    with nullcontext() if adapter in ("cllm", "draft") else pytest.raises(FewstepError):
        lm.with_adapter(tmp_path / adapter if adapter == "damaged" else folders / adapter)
    assert [parameter.requires_grad for parameter in parameters] == [i % 2 == 0 for i in range(len(parameters))]


def test_an_adapter_beside_a_base_adds_its_own_parameters_alone(folders: Path) -> None:
    base = load(folders / "base", device="cpu")
    known: set[int] = set()
    whole = added_bytes(base.network, known)
    assert whole == 4 * base.network.num_parameters
    assert added_bytes(base.network, known) == 0
    adapter = sum(tensor.nbytes for tensor in load_file(folders / "cllm" / "adapter_model.safetensors").values())
    assert adapter <= added_bytes(base.with_adapter(folders / "cllm").network, known) < whole
