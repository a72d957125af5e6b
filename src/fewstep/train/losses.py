"""Losses as pure functions of logits. Axes: N = scored positions, V = vocabulary, K = stored top tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _check(count: int, name: str) -> None:
    if count == 0:
        raise ValueError(f"{name} needs at least one position")


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats, or the weighted mean. ValueError if N is 0."""
    _check(len(targets_N), "cross_entropy")
    if weights_N is None:
        return F.cross_entropy(logits_NV.float(), targets_N)
    losses = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    return (losses * weights_N).sum() / weights_N.sum()


def divergence(
    teacher_NV: Tensor, student_NV: Tensor, *, direction: str = "forward", temperature: float = 1.0
) -> Tensor:
    """Mean KL(teacher || student) over positions in nats (`reverse`: KL(student || teacher)); both are logits.

    ValueError if N is 0. At a temperature other than 1 both are softened and the result is scaled by its square (Hinton et al.,
    arXiv 1503.02531). Gradients flow into whichever argument carries them.
    """
    _check(len(teacher_NV), "divergence")
    teacher = F.log_softmax(teacher_NV.float() / temperature, -1)
    student = F.log_softmax(student_NV.float() / temperature, -1)
    target, source = (teacher, student) if direction == "forward" else (student, teacher)
    terms = torch.where(target.exp() > 0, target.exp() * (target - source), 0.0)
    return terms.sum(-1).mean() * temperature**2


def divergence_from_top(
    top_ids_NK: Tensor, top_logp_NK: Tensor, tail_logp_N: Tensor, student_NV: Tensor, *, direction: str = "forward"
) -> Tensor:
    """Mean KL in nats between a stored distribution and the student's, both with everything outside the top K in one bin.

    `top_logp_NK` are the stored log-probabilities, `tail_logp_N` the logarithm of the mass outside them. Exact if the tail is
    empty, otherwise a lower bound of the full divergence (data processing inequality). ValueError if N is 0.
    """
    _check(len(top_ids_NK), "divergence_from_top")
    student = F.log_softmax(student_NV.float(), -1)
    student_top = student.gather(-1, top_ids_NK)
    floor = torch.finfo(torch.float32).eps
    student_tail = (1 - student_top.exp().sum(-1)).clamp_min(floor).log()
    teacher = torch.cat([top_logp_NK.float(), tail_logp_N.float()[:, None]], -1)
    teacher = teacher.clamp_min(-60.0)
    pupil = torch.cat([student_top, student_tail[:, None]], -1).clamp_min(-60.0)
    target, source = (teacher, pupil) if direction == "forward" else (pupil, teacher)
    return (target.exp() * (target - source)).sum(-1).mean()
