"""
Distillation objectives as pure functions of logits (DESIGN: "Distillation objectives").

p is the teacher's distribution over the vocabulary, q the student's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """sum p log p/q per position. Arguments are log-probabilities, float32, shape (positions, vocab)."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """sum q log q/p per position (the paper's Eq. 1). Arguments as in [`forward_kl`]."""
    return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)


def generalized_jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """
    beta KL(p||m) + (1 - beta) KL(q||m) with m = beta p + (1 - beta) q, per position (arXiv 2306.13649, as in TRL).

    `beta` 0 and 1 are the limits forward and reverse KL. Other arguments as in [`forward_kl`].
    """
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    weight = student.new_tensor(beta)
    mixture = torch.logaddexp(student + torch.log1p(-weight), teacher + torch.log(weight))
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    "forward_kl": forward_kl,
    "generalized_jsd": generalized_jsd,
    "reverse_kl": reverse_kl,
}

_TILE_POSITIONS = 512  # 512 x 49,152 float32 values are 100 MB


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    objective: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sum over positions of `(1 - w) * temperature^2 * divergence + w * cross-entropy`.

    Both distributions are taken at `temperature`, and the divergence is scaled by its square so that the size of its
    gradient stays comparable (Hinton et al. 2015). The cross-entropy is at temperature 1. All of it in float32.
    The teacher and the student may have different numbers of padding rows behind the same vocabulary: both are cut to
    the shorter one.

    Args:
        student_logits (`torch.Tensor`): any float dtype, shape (positions, student vocab).
        teacher_logits (`torch.Tensor`): any float dtype, shape (positions, teacher vocab).
        labels (`torch.Tensor`): int64, shape (positions,): the next token of each position.
        objective (`str`, *optional*, defaults to `"reverse_kl"`): a key of `DIVERGENCES`.
        beta (`float`, *optional*, defaults to 0.5): for `"generalized_jsd"`.
        temperature (`float`, *optional*, defaults to 1.0): of both distributions.
        cross_entropy_weight (`float`, *optional*, defaults to 0.0): w, in [0, 1].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sum, and the divergence's part of it without weight (detached), both
        float32 scalars. No positions give a zero that still reaches the student.
    """
    divergence = DIVERGENCES[objective]
    vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])
    total = student_logits[:0].float().sum()
    divergence_total = total.detach().clone()
    for start in range(0, labels.shape[0], _TILE_POSITIONS):
        rows = slice(start, start + _TILE_POSITIONS)
        student = student_logits[rows, :vocab].float()
        if cross_entropy_weight:
            total = total + cross_entropy_weight * F.cross_entropy(student, labels[rows], reduction="sum")
        if cross_entropy_weight < 1:
            q = F.log_softmax(student / temperature, dim=-1)
            p = F.log_softmax(teacher_logits[rows, :vocab].float() / temperature, dim=-1)
            value = divergence(q, p, beta=beta).sum() * temperature**2
            total = total + (1 - cross_entropy_weight) * value
            divergence_total += value.detach()
    return total, divergence_total


__all__ = ["DIVERGENCES", "distillation_loss", "forward_kl", "generalized_jsd", "reverse_kl"]
