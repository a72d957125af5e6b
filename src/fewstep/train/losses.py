"""Losses as pure functions of logits. Axes: N = scored positions, V = vocabulary, K = stored top tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_STORED_LOGP = -24 * math.log(2)
"""A stored log-probability below this is not told from 0: tails were formed as 1 - sum in float32, which resolves
2^-24.
"""


def _check(count: int, name: str) -> None:
    if count == 0:
        raise ValueError(f"{name} needs at least one position")


def _check_direction(direction: str) -> None:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"unknown direction {direction!r}; choose forward or reverse")


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy in nats, or the weighted mean. ValueError if N is 0.

    With `label_smoothing` that share of the target's mass is spread evenly over the vocabulary (arXiv 1512.00567).
    """
    _check(len(targets_N), "cross_entropy")
    if weights_N is None:
        return F.cross_entropy(logits_NV.float(), targets_N, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits_NV.float(), targets_N, reduction="none", label_smoothing=label_smoothing)
    return (losses * weights_N).sum() / weights_N.sum()


def divergence(
    teacher_NV: Tensor, student_NV: Tensor, *, direction: str = "forward", temperature: float = 1.0
) -> Tensor:
    """Mean KL(teacher || student) over positions in nats (`reverse`: KL(student || teacher)); both are logits.

    What one of them rules out with -inf (the mask token, which is never emitted) is ruled out for both. ValueError if N
    is 0. At a temperature other than 1 both are softened and the result is scaled by its square (Hinton et al., arXiv
    1503.02531). Gradients flow into whichever argument carries them.
    """
    _check(len(teacher_NV), "divergence")
    _check_direction(direction)
    ruled_out_NV = teacher_NV.isneginf() | student_NV.isneginf()
    teacher, student = (
        F.log_softmax((logits.float() / temperature).masked_fill(ruled_out_NV, float("-inf")), -1)
        for logits in (teacher_NV, student_NV)
    )
    target, source = (teacher, student) if direction == "forward" else (student, teacher)
    # The difference of two -inf is masked before it is multiplied, since 0 x NaN is NaN, in the gradient too.
    gap = (target - source).masked_fill(ruled_out_NV, 0.0)
    return (target.exp() * gap).sum(-1).mean() * temperature**2


def divergence_from_top(
    top_ids_NK: Tensor, top_logp_NK: Tensor, tail_logp_N: Tensor, student_NV: Tensor, *, direction: str = "forward"
) -> Tensor:
    """Mean KL in nats between a stored distribution and the student's, both with everything outside the top K in one
    bin.

    `top_logp_NK` are the stored log-probabilities, `tail_logp_N` the logarithm of the mass outside them; they are
    normalised here, since they were rounded. Exact if the tail is empty, otherwise a lower bound of the full divergence
    (data processing inequality). ValueError if N is 0.
    """
    _check(len(top_ids_NK), "divergence_from_top")
    _check_direction(direction)
    student_NV = student_NV.float()
    stored = torch.cat([top_logp_NK.float(), tail_logp_N.float()[:, None]], -1).clamp_min(LEAST_STORED_LOGP)
    teacher = F.log_softmax(stored, -1)
    if top_ids_NK.shape[-1] == student_NV.shape[-1]:  # nothing lies outside the top
        teacher = F.log_softmax(stored[:, :-1], -1)
        student = F.log_softmax(student_NV, -1).gather(-1, top_ids_NK)
    else:
        # The tail from its own logits: 1 - sum(top) would lose all digits where the student is sure.
        tail = student_NV.scatter(-1, top_ids_NK, float("-inf")).logsumexp(-1, keepdim=True)
        student = F.log_softmax(torch.cat([student_NV.gather(-1, top_ids_NK), tail], -1), -1)
    target, source = (teacher, student) if direction == "forward" else (student, teacher)
    return (target.exp() * (target - source)).sum(-1).mean()
