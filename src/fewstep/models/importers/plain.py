"""Arithmetic for the families' plain forwards: float32, one text, no cache, nothing shared with transformers.

Axes: T = positions, D = width, H = heads, E = head width (F = half of it), V = vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError


def rms_norm(x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Each row divided by its root mean square, times the weight. arXiv 1910.07467."""
    return x_TD / (x_TD.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight_D


def linear(x_TD: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """x W^T + b."""
    assert weight is not None
    y = x_TD @ weight.T
    return y if bias is None else y + bias


def gated(x_TD: Tensor, gate: Tensor | None, up: Tensor | None, down: Tensor | None) -> Tensor:
    """SwiGLU, arXiv 2002.05202: the gate goes through SiLU."""
    gate_TD = linear(x_TD, gate)
    return linear(gate_TD * torch.sigmoid(gate_TD) * linear(x_TD, up), down)


def angles(num_positions: int, width: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Rotary angles [T, F]: position times theta^(-2f / E). arXiv 2104.09864. FewstepError for an unknown scaling."""
    frequency_F = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    if scaling is not None:
        frequency_F = _scaled(frequency_F, scaling)
    return torch.arange(num_positions, dtype=torch.float32)[:, None] * frequency_F


def _scaled(frequency_F: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return frequency_F
    factor = scaling.get("factor", 1.0)
    if kind == "linear":
        return frequency_F / factor
    if kind == "llama3":
        # Llama 3.1: long waves are stretched by the factor, short ones kept, those between blended.
        turns_F = scaling["original_max_position_embeddings"] * frequency_F / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep_F = ((turns_F - low) / (high - low)).clamp(0, 1)
        return frequency_F * (keep_F + (1 - keep_F) / factor)
    raise FewstepError(f"the check knows no rotary scaling of type {kind!r}; import without it")


def rotate_halves(x_THE: Tensor, angles_TF: Tensor) -> Tensor:
    """Turn the pairs (f, f + E/2) by their angles."""
    cos_T1F, sin_T1F = angles_TF.cos()[:, None], angles_TF.sin()[:, None]
    first_THF, second_THF = x_THE.chunk(2, dim=-1)
    return torch.cat([first_THF * cos_T1F - second_THF * sin_T1F, second_THF * cos_T1F + first_THF * sin_T1F], dim=-1)


def rotate_neighbours(x_THE: Tensor, angles_TF: Tensor) -> Tensor:
    """Turn the pairs (2f, 2f + 1) by their angles."""
    cos_T1F, sin_T1F = angles_TF.cos()[:, None], angles_TF.sin()[:, None]
    even_THF, odd_THF = x_THE[..., 0::2], x_THE[..., 1::2]
    turned = [even_THF * cos_T1F - odd_THF * sin_T1F, odd_THF * cos_T1F + even_THF * sin_T1F]
    return torch.stack(turned, dim=-1).flatten(-2)


def attend(q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, visible_TT: Tensor) -> Tensor:
    """Softmax attention of every query head; key heads are shared by neighbouring query heads. Returns [T, H * E]."""
    group = q_THE.shape[1] // k_THE.shape[1]
    heads = []
    for head in range(q_THE.shape[1]):
        scores_TT = q_THE[:, head] @ k_THE[:, head // group].T / math.sqrt(q_THE.shape[-1])
        heads.append(scores_TT.masked_fill(~visible_TT, -torch.inf).softmax(-1) @ v_THE[:, head // group])
    return torch.cat(heads, dim=-1)


def blocks_visible(num_positions: int, block_size: int) -> Tensor:
    """Whether position t sees position s, [T, T]: its own block and earlier ones; size 1 is causal attention."""
    block_T = torch.arange(num_positions) // block_size
    return block_T[None, :] <= block_T[:, None]


def sliding_window_visible(num_positions: int, sliding_window: int | None) -> Tensor:
    """Whether position s is fewer than `sliding_window` before position t, or after it, [T, T]; None: all are."""
    position_T = torch.arange(num_positions)
    return position_T[None, :] > position_T[:, None] - (num_positions + 1 if sliding_window is None else sliding_window)
