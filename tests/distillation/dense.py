"""The objective of stepwise distillation written out plainly, without tiles, masks or padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


def dense_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    objective: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
) -> torch.Tensor:
    """Sum over positions of (1 - w) T^2 D + w CE; logits of one vocabulary, shape (positions, vocab)."""
    p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum(-1, keepdim=True) for x in (teacher, student))
    m = beta * p + (1 - beta) * q
    if objective == "generalized_jsd":
        objective = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, objective)
    divergence = {
        "forward_kl": lambda: p * (p / q).log(),
        "reverse_kl": lambda: q * (q / p).log(),
        "generalized_jsd": lambda: beta * p * (p / m).log() + (1 - beta) * q * (q / m).log(),
    }[objective]().sum()
    normalised = torch.exp(student) / torch.exp(student).sum(-1, keepdim=True)
    cross_entropy = -normalised[torch.arange(len(labels)), labels].log().sum()
    return (1 - cross_entropy_weight) * temperature**2 * divergence + cross_entropy_weight * cross_entropy


Row = tuple[Sequence[int], Sequence[int]]  # token ids, and labels with -100 where nothing is supervised


@torch.no_grad()
def dense_mean(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Row], vocab: int, **options: float | str
) -> float:
    """The objective over rows of tokens, each run alone, divided by the number of supervised tokens."""
    total, count = 0.0, 0
    for input_ids, row_labels in rows:
        labels = torch.tensor(row_labels[1:])
        chosen = labels != -100
        one, other = (
            model(input_ids=torch.tensor([input_ids])).logits[0, :-1, :vocab].double()[chosen]
            for model in (student, teacher)
        )
        total += float(dense_loss(one, other, labels[chosen], **options))  # type: ignore[arg-type]
        count += int(chosen.sum())
    return total / count
