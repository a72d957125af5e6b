"""SDAR, arXiv 2510.06303: a Qwen3 that denoises block after block; blocks count from the start of the text."""

from torch import Tensor
from transformers import PreTrainedConfig, Qwen3Config

from fewstep.errors import FewstepError
from fewstep.models.importers import causal
from fewstep.models.importers.family import Config, Family, Weights, picked, refuse
from fewstep.models.roles import Role

_SETTINGS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
]
_OPTIONAL = [
    "tie_word_embeddings",
    "attention_bias",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
]


def _stock_config(config: Config) -> PreTrainedConfig:
    refuse(config, hidden_act="silu", use_sliding_window=False, rope_scaling=None)
    optional = [name for name in _OPTIONAL if name in config]
    return Qwen3Config(**picked(config, {name: name for name in [*_SETTINGS, *optional]}))


def _role(config: Config, mask_token_id: int | None) -> Role:
    return Role(
        name="block_causal",
        block_size=_block_size(config),
        mask_token_id=mask_token_id,
        context_attention="block_causal",
    )


def _block_size(config: Config) -> int:
    size = config.get("block_size")
    if not isinstance(size, int):
        raise FewstepError(
            "config.json has no 'block_size'; give the one that the model was trained with (--block-size)"
        )
    return size


def _forward(config: Config, weights: Weights, tokens_T: Tensor) -> Tensor:
    return causal.forward(config, weights, tokens_T, block_size=_block_size(config))


SDAR = Family(
    model_type="sdar",
    stock_config=_stock_config,
    role=_role,
    forward=_forward,
    names={},
    needs_mask=True,
    tokenizer_class="Qwen2Tokenizer",
)
