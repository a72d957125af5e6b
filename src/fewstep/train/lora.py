"""LoRA through PEFT, and the folders that trained models are saved to."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fewstep.errors import FewstepError
from fewstep.files import read_json, write_json_whole
from fewstep.models.network import Network

MAX_SHARD_SIZE = "15MB"
"""Small files, so that a small model can be kept in a repository."""


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Low-rank adapters on all linear layers of attention and MLP (arXiv 2106.09685)."""

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise FewstepError(f"LoRA rank must be at least 1, got {self.rank}; try 32")
        if not self.alpha > 0:
            raise FewstepError(f"LoRA alpha must be above 0, got {self.alpha}; try the rank")
        if not 0 <= self.dropout < 1:
            raise FewstepError(f"LoRA dropout is a share below 1, got {self.dropout}")


def add_lora(network: Network, settings: LoRASettings) -> PeftModel:
    """Freeze the network and put trainable adapters into its layers, in place."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(network.module, config)
    assert isinstance(model, PeftModel)
    return model


def save_trained(network: Network, trained: nn.Module, folder: Path, *, dtype: torch.dtype, home: Path) -> None:
    """Write into `folder`, in `dtype`, a plain model or the adapter if `trained` is a PEFT model; its weights stay as
    they are.

    An adapter's folder also holds config.json with the role, and the tokenizer, so that it is complete beside its base,
    which it names relative to `home`, where the files will lie in the end (or by its bundled name or hub id).
    """
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in trained.state_dict().items()}
    config = network.module.config
    for key, value in {**network.role.to_config(), "use_cache": True}.items():
        setattr(config, key, value)
    if isinstance(trained, PeftModel):
        base = Path(network.name)
        name = os.path.relpath(base.resolve(), home.resolve()) if base.is_dir() else network.name
        trained.peft_config["default"].base_model_name_or_path = name
        # The embeddings are never trained; asking whether they were would look for the base on the hub.
        trained.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        config.save_pretrained(folder)
    else:
        network.module.save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
    # transformers writes the type of the module in training.
    stored = read_json(folder / "config.json")
    write_json_whole(folder / "config.json", {**stored, "dtype": str(dtype).removeprefix("torch.")})
    network.tokenizer.save_pretrained(folder)
