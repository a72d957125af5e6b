"""Plain causal folders: Llama (SmolLM among them), Qwen2, Qwen3; and the forward of all that use their names.

Axes as in `plain`.
"""

from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from fewstep.models.importers import plain
from fewstep.models.importers.family import Config, Family, Weights, refuse
from fewstep.models.roles import Role


def _stock_config(config: Config) -> PreTrainedConfig:
    refuse(config, hidden_act="silu", mlp_bias=False)
    # What is null counts as not set, but for tokens and a sliding window, of which a checkpoint may have none.
    settings = {
        name: value
        for name, value in config.items()
        if name not in _OF_THE_FILE and (value is not None or name == "sliding_window" or name.endswith("token_id"))
    }
    return AutoConfig.for_model(config["model_type"], **settings)


_OF_THE_FILE = {"architectures", "auto_map", "model_type", "transformers_version", "_name_or_path"}
_OF_THE_FILE |= {"attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"}
"""Settings that are about the checkpoint's own code or writer, or the machine that it was written on."""


def _role(config: Config, mask_token_id: int | None) -> Role:
    return Role(name="autoregressive", mask_token_id=mask_token_id)


def forward(config: Config, weights: Weights, tokens_T: Tensor, block_size: int | None = 1) -> Tensor:
    """Logits [T, V] of a decoder-only transformer with Llama's tensor names.

    Biases and the norms of queries and keys (Qwen3) are applied where the checkpoint has them. Rows see their own block
    of `block_size` positions and earlier ones; None = all.
    """
    num_positions, num_heads = len(tokens_T), config["num_attention_heads"]
    epsilon = config.get("rms_norm_eps") or _EPSILON
    embedding_VD = _given(weights, "model.embed_tokens.weight")
    x_TD = embedding_VD[tokens_T]
    width = config.get("head_dim") or config["hidden_size"] // num_heads
    in_blocks_TT = plain.blocks_visible(num_positions, block_size or num_positions)
    angles_TF = plain.angles(num_positions, width, *_rotary(config))

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"

        def heads_of(name: str, y_TD: Tensor, prefix: str = f"{prefix}.self_attn") -> Tensor:
            weight, bias = weights(f"{prefix}.{name}_proj.weight"), weights(f"{prefix}.{name}_proj.bias")
            y_THE = plain.linear(y_TD, weight, bias).unflatten(-1, (-1, width))
            norm_E = weights(f"{prefix}.{name}_norm.weight")
            return y_THE if norm_E is None else plain.rms_norm(y_THE, norm_E, epsilon)

        y_TD = plain.rms_norm(x_TD, _given(weights, f"{prefix}.input_layernorm.weight"), epsilon)
        q_THE, k_THE = (plain.rotate_halves(heads_of(name, y_TD), angles_TF) for name in "qk")
        visible_TT = in_blocks_TT & plain.sliding_window_visible(num_positions, _sliding_window(config, layer))
        y_TD = plain.attend(q_THE, k_THE, heads_of("v", y_TD), visible_TT)
        output = f"{prefix}.self_attn.o_proj"
        x_TD = x_TD + plain.linear(y_TD, weights(f"{output}.weight"), weights(f"{output}.bias"))

        y_TD = plain.rms_norm(x_TD, _given(weights, f"{prefix}.post_attention_layernorm.weight"), epsilon)
        x_TD = x_TD + plain.gated(
            y_TD, *(weights(f"{prefix}.mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        )

    x_TD = plain.rms_norm(x_TD, _given(weights, "model.norm.weight"), epsilon)
    # A head that is stored is used, whatever config.json says of tied embeddings.
    head_VD = weights("lm_head.weight")
    return plain.linear(x_TD, embedding_VD if head_VD is None else head_VD)


_EPSILON = 1e-6
"""Of the norms, where config.json does not say, in all classes with these names."""


def _given(weights: Weights, name: str) -> Tensor:
    tensor = weights(name)
    assert tensor is not None, name
    return tensor


def _sliding_window(config: Config, layer: int) -> int | None:
    """The sliding window of a layer: Qwen's are those that `layer_types` names, or all from `max_window_layers` on."""
    if not config.get("use_sliding_window"):
        return None
    types = config.get("layer_types")
    slides = types[layer] == "sliding_attention" if types else layer >= config.get("max_window_layers", 28)
    return config.get("sliding_window", 4096) if slides else None


def _rotary(config: Config) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, which transformers 5 writes into one dictionary and earlier versions into two settings."""
    together = config.get("rope_parameters") or {}
    theta = together.get("rope_theta") or config.get("rope_theta") or 10_000.0
    return theta, together or config.get("rope_scaling")


FAMILIES = [
    Family(model_type=name, stock_config=_stock_config, role=_role, forward=forward, names={})
    for name in ("llama", "qwen2", "qwen3")
]
