"""LLaDA, arXiv 2502.09992: a Llama with full attention under names of its own; row t scores token t.

Axes as in `plain`.
"""

from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from fewstep.models.importers import plain
from fewstep.models.importers.family import Config, Family, Weights, picked, refuse
from fewstep.models.roles import Role

_SETTINGS = {
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_NAMES = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
    "model.transformer.blocks.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "model.transformer.blocks.{}.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "model.transformer.blocks.{}.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "model.transformer.blocks.{}.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "model.transformer.blocks.{}.attn_out.weight": "model.layers.{}.self_attn.o_proj.weight",
    "model.transformer.blocks.{}.ff_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "model.transformer.blocks.{}.ff_proj.weight": "model.layers.{}.mlp.gate_proj.weight",
    "model.transformer.blocks.{}.up_proj.weight": "model.layers.{}.mlp.up_proj.weight",
    "model.transformer.blocks.{}.ff_out.weight": "model.layers.{}.mlp.down_proj.weight",
}


def _stock_config(config: Config) -> PreTrainedConfig:
    refuse(
        config,
        block_type="llama",
        activation_type="silu",
        layer_norm_type="rms",
        rope=True,
        alibi=False,
        attention_layer_norm=False,
        input_emb_norm=False,
        scale_logits=False,
        include_bias=False,
        include_qkv_bias=False,
        bias_for_layer_norm=False,
        block_group_size=1,
        multi_query_attention=False,
    )
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return LlamaConfig(
        **picked(config, _SETTINGS),
        vocab_size=config.get("embedding_size") or picked(config, {"vocab_size": "vocab_size"})["vocab_size"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        tie_word_embeddings=bool(config.get("weight_tying", False)),
        **{name: config[name] for name in tokens if name in config},
    )


def _role(config: Config, mask_token_id: int | None) -> Role:
    return Role(name="bidirectional", mask_token_id=mask_token_id)


def _forward(config: Config, weights: Weights, tokens_T: Tensor) -> Tensor:
    def given(name: str) -> Tensor:
        tensor = weights(f"model.transformer.{name}.weight")
        assert tensor is not None, name
        return tensor

    num_positions, epsilon = len(tokens_T), config["rms_norm_eps"]
    width = config["d_model"] // config["n_heads"]
    angles_TF = plain.angles(num_positions, width, config["rope_theta"])
    everything_TT = plain.blocks_visible(num_positions, num_positions)
    x_TD = given("wte")[tokens_T]
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}"
        y_TD = plain.rms_norm(x_TD, given(f"{block}.attn_norm"), epsilon)
        q_THE, k_THE, v_THE = (
            plain.linear(y_TD, given(f"{block}.{name}_proj")).unflatten(-1, (-1, width)) for name in "qkv"
        )
        q_THE, k_THE = plain.rotate_halves(q_THE, angles_TF), plain.rotate_halves(k_THE, angles_TF)
        x_TD = x_TD + plain.linear(plain.attend(q_THE, k_THE, v_THE, everything_TT), given(f"{block}.attn_out"))
        y_TD = plain.rms_norm(x_TD, given(f"{block}.ff_norm"), epsilon)
        x_TD = x_TD + plain.gated(y_TD, given(f"{block}.ff_proj"), given(f"{block}.up_proj"), given(f"{block}.ff_out"))
    head_VD = weights("model.transformer.ff_out.weight")
    return plain.linear(plain.rms_norm(x_TD, given("ln_f"), epsilon), given("wte") if head_VD is None else head_VD)


LLADA = Family(
    model_type="llada", stock_config=_stock_config, role=_role, forward=_forward, names=_NAMES, needs_mask=True
)
