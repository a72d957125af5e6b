"""Dream, arXiv 2508.15487: a Qwen2 with full attention whose row t scores token t + 1."""

from functools import partial

from transformers import PreTrainedConfig, Qwen2Config

from fewstep.models.importers import causal
from fewstep.models.importers.family import Config, Family, picked, refuse
from fewstep.models.roles import Role

_SETTINGS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
]
_OPTIONAL = ["tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"]


def _stock_config(config: Config) -> PreTrainedConfig:
    refuse(config, hidden_act="silu", use_sliding_window=False, rope_scaling=None)
    optional = [name for name in _OPTIONAL if name in config]
    return Qwen2Config(**picked(config, {name: name for name in [*_SETTINGS, *optional]}))


def _role(config: Config, mask_token_id: int | None) -> Role:
    return Role(name="bidirectional", mask_token_id=mask_token_id, right_shift_logits=True)


DREAM = Family(
    model_type="Dream",
    stock_config=_stock_config,
    role=_role,
    forward=partial(causal.forward, block_size=None),
    names={},
    needs_mask=True,
    tokenizer_class="Qwen2Tokenizer",
)
