"""LoRA through PEFT, and the folders that trained models are saved to."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fewstep.errors import FewstepError
from fewstep.models.network import Network


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Low-rank adapters on all linear layers of attention and MLP (arXiv 2106.09685)."""

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise FewstepError(f"LoRA rank must be at least 1, got {self.rank}; try 32")
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


def save_trained(network: Network, trained: nn.Module, folder: Path, *, dtype: torch.dtype) -> None:
    """Write a plain folder, or the adapter if `trained` is a PEFT model, in `dtype`; the training copy is left as it is.

    An adapter's folder also holds config.json with the role, and the tokenizer, so that it is complete beside its base.
    """
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in trained.state_dict().items()}
    config = network.module.config
    for key, value in {**network.role.to_config(), "use_cache": True, "dtype": dtype}.items():
        setattr(config, key, value)
    if isinstance(trained, PeftModel):
        trained.peft_config["default"].base_model_name_or_path = network.name
        trained.save_pretrained(str(folder), state_dict=state)
        config.save_pretrained(folder)
    else:
        network.module.save_pretrained(folder, state_dict=state, max_shard_size="15MB")
    network.tokenizer.save_pretrained(folder)

