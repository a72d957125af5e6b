"""The attention that training uses: one packed layout, dense under SDPA on a CPU, FlexAttention on a GPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from fewstep.models.masks import Layout

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


def prepare_attention(module: PreTrainedModel, *, compiled: bool) -> None:
    """Choose the attention back end that goes with `training_mask`."""
    module.set_attn_implementation(_FLEX if compiled else "sdpa")


def compile_layers(module: PreTrainedModel) -> None:
    """Compile each layer on its own, so that all share one graph and compilation takes seconds, not minutes."""
    for layer in module.base_model.layers:
        layer.compile(dynamic=False)


def training_mask(layout: Layout, *, compiled: bool) -> Tensor | BlockMask:
    """The layout's mask in the form that the prepared module takes."""
    return layout.flex(_compiled_create_block_mask) if compiled else layout.dense()
