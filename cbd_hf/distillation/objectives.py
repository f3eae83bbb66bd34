"""
Distillation objectives as pure functions of log-probabilities (DESIGN: "Distillation objectives").

p is the teacher's distribution, q the student's. The last axis holds the vocabulary, or, for a cached teacher, its k
most likely tokens and one entry for all others: every function works on either. Log-probabilities are finite;
[`bounded`] makes those of ruled-out tokens so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


_LEAST_LOG_PROB = -1e4  # float32 has no probability below exp(-104)


def bounded(log_probs: torch.Tensor) -> torch.Tensor:
    """
    Log-probabilities with a finite one, of probability 0, for tokens that a model rules out with logits of -inf.

    With both models' -inf a divergence would be 0 log 0/0, which is nan in place of 0. Where one model rules out what
    the other does not, a KL divergence is as large as the bound makes it: probability times 10,000.
    """
    return log_probs.clamp(min=_LEAST_LOG_PROB)


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """sum p log p/q. Arguments are log-probabilities, shape (positions, entries); the result is (positions,)."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """sum q log q/p (the paper's Eq. 1). Arguments and result as in [`forward_kl`]."""
    return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)


def generalized_jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """
    beta KL(p||m) + (1 - beta) KL(q||m) with m = beta p + (1 - beta) q (arXiv 2306.13649, as in TRL).

    `beta` 0 and 1 are the limits forward and reverse KL. Other arguments and result as in [`forward_kl`].
    """
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    mixture = _mix(student, teacher, beta)
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


def skew_forward_kl(student: torch.Tensor, teacher: torch.Tensor, skew: float = 0.1) -> torch.Tensor:
    """KL(p || skew p + (1 - skew) q) (arXiv 2402.03898). Other arguments and result as in [`forward_kl`]."""
    return forward_kl(_mix(student, teacher, skew), teacher)


def skew_reverse_kl(student: torch.Tensor, teacher: torch.Tensor, skew: float = 0.1) -> torch.Tensor:
    """KL(q || (1 - skew) p + skew q) (arXiv 2402.03898). Other arguments and result as in [`forward_kl`]."""
    return forward_kl(_mix(student, teacher, 1 - skew), student)


def adaptive_kl(student: torch.Tensor, teacher: torch.Tensor, head_mass: float = 0.5) -> torch.Tensor:
    """
    g forward KL + (1 - g) reverse KL (arXiv 2404.02657).

    g is the share of sum |p - q| that lies in the teacher's head: its most likely tokens, as many as are needed for a
    mass above `head_mass`. No gradient flows through g. Other arguments and result as in [`forward_kl`].
    """
    with torch.no_grad():
        p = teacher.exp()
        gap = (p - student.exp()).abs()
        share = _head_sum(p, gap, head_mass) / gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)
    return share * forward_kl(student, teacher) + (1 - share) * reverse_kl(student, teacher)


def total_variation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """sum |p - q| / 2. Arguments and result as in [`forward_kl`]."""
    return (student.exp() - teacher.exp()).abs().sum(-1) / 2


def _mix(student: torch.Tensor, teacher: torch.Tensor, teacher_share: float) -> torch.Tensor:
    """log(a p + (1 - a) q); the limits need no mixing."""
    if teacher_share in (0, 1):
        return teacher if teacher_share else student
    return torch.logaddexp(student + math.log1p(-teacher_share), teacher + math.log(teacher_share))


_FIRST_TOKENS = 256  # a head rarely has more; sorting a whole vocabulary takes longer than the rest of the loss


def _head_sum(p: torch.Tensor, values: torch.Tensor, head_mass: float) -> torch.Tensor:
    """Sum of `values` over the most likely entries: those before which less than `head_mass` lies, or just as much."""

    def of(rows: torch.Tensor, row_values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        top, index = rows.topk(count, dim=-1)
        before = top.cumsum(-1) - top
        inside = before <= head_mass
        return (row_values.gather(-1, index) * inside).sum(-1), inside[..., -1]

    count = min(_FIRST_TOKENS, p.shape[-1])
    result, unfinished = of(p, values, count)
    if count < p.shape[-1] and bool(unfinished.any()):
        result[unfinished] = of(p[unfinished], values[unfinished], p.shape[-1])[0]
    return result


DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    "adaptive_kl": adaptive_kl,
    "forward_kl": forward_kl,
    "generalized_jsd": generalized_jsd,
    "reverse_kl": reverse_kl,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


@dataclass(frozen=True)
class Objective:
    """
    What is minimised per supervised token: `(1 - w) * temperature^2 * divergence + w * cross-entropy`.

    Both distributions are taken at `temperature`, and the divergence is scaled by its square so that the size of its
    gradient stays comparable (Hinton et al. 2015). The cross-entropy is at temperature 1.

    Args:
        name (`str`, *optional*, defaults to `"reverse_kl"`): a key of `DIVERGENCES`.
        beta (`float`, *optional*, defaults to 0.5): in [0, 1], of `"generalized_jsd"`.
        skew (`float`, *optional*, defaults to 0.1): in [0, 1), of the skew divergences.
        head_mass (`float`, *optional*, defaults to 0.5): in (0, 1), of `"adaptive_kl"`.
        temperature (`float`, *optional*, defaults to 1.0): of both distributions, above 0.
        cross_entropy_weight (`float`, *optional*, defaults to 0.0): w, in [0, 1].

    Raises:
        ValueError: one of them is out of its range.
    """

    name: str = "reverse_kl"
    beta: float = 0.5
    skew: float = 0.1
    head_mass: float = 0.5
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ValueError(f"objective={self.name!r} is unknown; choose one of {sorted(DIVERGENCES)}.")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} is outside [0, 1]: 0 is forward KL, 1 reverse KL.")
        if not 0 <= self.skew < 1:
            raise ValueError(f"skew={self.skew} is outside [0, 1): 0 is the plain KL divergence.")
        if not 0 < self.head_mass < 1:
            raise ValueError(f"head_mass={self.head_mass} is outside (0, 1): half the teacher's mass is 0.5.")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be greater than 0; 1 leaves the logits as they are."
            )
        if not 0 <= self.cross_entropy_weight <= 1:
            raise ValueError(
                f"cross_entropy_weight={self.cross_entropy_weight} is outside [0, 1]: 0 trains on the teacher alone, "
                "1 on the data alone."
            )

    @property
    def options(self) -> dict[str, float]:
        """The divergence's own options."""
        return {
            "adaptive_kl": {"head_mass": self.head_mass},
            "generalized_jsd": {"beta": self.beta},
            "skew_forward_kl": {"skew": self.skew},
            "skew_reverse_kl": {"skew": self.skew},
        }.get(self.name, {})

    def divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The divergence of log-probabilities at `temperature`, times its square; shape (positions,)."""
        return DIVERGENCES[self.name](student, teacher, **self.options) * self.temperature**2


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    objective: Objective | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The objective summed over positions, from whole logits; all of it in float32.

    The teacher and the student may have different numbers of padding rows behind the same vocabulary: both are cut to
    the shorter one. Training does not use this but [`tiled_loss`], which never holds the logits of a batch.

    Args:
        student_logits (`torch.Tensor`): any float dtype, shape (positions, student vocab).
        teacher_logits (`torch.Tensor`): any float dtype, shape (positions, teacher vocab).
        labels (`torch.Tensor`): int64, shape (positions,): the next token of each position.
        objective ([`Objective`], *optional*): by default the paper's.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sum, and the divergence's part of it without weight (detached), both
        float32 scalars. No positions give a zero that still reaches the student.
    """
    objective = objective or Objective()
    weight = objective.cross_entropy_weight
    vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student = student_logits[..., :vocab].float()
    total = student[:0].sum()
    divergence = total.detach()
    if weight:
        total = total + weight * F.cross_entropy(student, labels, reduction="sum")
    if weight < 1:
        q = F.log_softmax(student / objective.temperature, dim=-1)
        p = F.log_softmax(teacher_logits[..., :vocab].float() / objective.temperature, dim=-1)
        value = objective.divergence(bounded(q), bounded(p)).sum()
        total = total + (1 - weight) * value
        divergence = value.detach()
    return total, divergence


__all__ = [
    "DIVERGENCES",
    "Objective",
    "adaptive_kl",
    "bounded",
    "distillation_loss",
    "forward_kl",
    "generalized_jsd",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]
