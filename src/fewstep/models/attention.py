"""The attention that training uses: one packed layout, dense under SDPA on a CPU, FlexAttention on a GPU.

Axes: R = packed rows, T = positions of a row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from fewstep.errors import FewstepError
from fewstep.models.architectures import within_sliding_window
from fewstep.models.masks import Layout, added_to_scores
from fewstep.models.network import Network

_FLEX = "fewstep_flex"


def _flex_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface on bare FlexAttention, so that it fuses into the compiled layer around it."""
    out = flex_attention(
        query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_FLEX, _flex_forward)
_compiled_create_block_mask = torch.compile(create_block_mask, dynamic=False)


def check_trainable(network: Network, *, compiled: bool) -> None:
    """FewstepError for a network whose attention or positions packed training would not compute as they are defined."""
    if network.architecture.long_from is not None:
        raise FewstepError(
            f"{network.name} has rotary factors that depend on the length of a text (longrope), which packed training "
            "does not apply; train a model without them"
        )
    if compiled and (network.architecture.sliding_window is not None or not _takes_plain_attention(network.module)):
        raise FewstepError(
            f"{network.name} has a sliding window or attention of its own, which compiled training does not apply; "
            "train it without --compiled"
        )


def prepare_attention(module: PreTrainedModel, *, compiled: bool) -> None:
    """Choose the attention back end that goes with `training_mask`; without `compiled` that of decoding."""
    plain = "sdpa" if _takes_plain_attention(module) else "eager"
    module.set_attn_implementation(_FLEX if compiled else plain)


def _takes_plain_attention(module: PreTrainedModel) -> bool:
    """Whether the class's attention is softmax(q k) v: with a soft cap (Gemma 2) or sinks (GPT-OSS) it is not."""
    return bool(module._supports_sdpa)


def compile_layers(module: PreTrainedModel) -> None:
    """Compile each layer on its own, so that all share one graph and compilation takes seconds, not minutes."""
    for layer in module.base_model.layers:
        layer.compile(dynamic=False)


def training_mask(network: Network, layout: Layout, positions_RT: Tensor, *, compiled: bool) -> Any:
    """The layout's mask in the form that the prepared module takes."""
    if compiled:
        return layout.flex(_compiled_create_block_mask)
    whole, width = layout.dense(), network.architecture.sliding_window
    sliding = None if width is None else whole & within_sliding_window(positions_RT, positions_RT, width)
    if not _takes_plain_attention(network.module):  # such attention adds the mask to its scores
        whole = added_to_scores(whole, torch.float32)
        sliding = None if sliding is None else added_to_scores(sliding, torch.float32)
    return network.architecture.attention_mask(whole, sliding)
