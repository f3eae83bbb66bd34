"""The student's side of a bridge's loss: spans and hidden states compared with those of a source of other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cbd_hf.distillation.bridge.objectives import SpanObjective, Vocabularies
from cbd_hf.distillation.bridge.spans import Alignment
from cbd_hf.distillation.bridge.tiles import tiled_span_loss
from cbd_hf.distillation.predictions import Head, Predictions
from cbd_hf.distillation.student import StudentLoss


@dataclass(frozen=True)
class AlignedPredictions:
    """
    What a source says, and where the student says the same.

    Args:
        source ([`DensePredictions`] or [`SparsePredictions`]): at the source's supervised positions.
        alignment ([`Alignment`]): of these and the student's.
    """

    source: Predictions
    alignment: Alignment

    @property
    def layers(self) -> tuple[torch.Tensor, ...]:
        """Hidden states of the source in front of every span, one tensor (spans, source hidden) per layer."""
        starts = _starts(self.alignment.source_spans, self.alignment.count)
        return tuple(layer[starts] for layer in self.source.layers)

    def to(self, device: torch.device) -> AlignedPredictions:
        """On another device."""
        return AlignedPredictions(self.source.to(device), self.alignment.to(device))


def _starts(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """The position of each span's first token."""
    places = torch.arange(len(numbers), device=numbers.device)
    inside = numbers >= 0
    starts = torch.full((count,), len(numbers), dtype=torch.int64, device=numbers.device)
    return starts.scatter_reduce(0, numbers[inside], places[inside], "amin")


class BridgeStudentLoss(StudentLoss):
    """
    [`StudentLoss`] over spans.

    Hidden states are matched in front of every span, where both models have read the same text.

    Args:
        model, layers, hidden_weight: as in [`StudentLoss`].
        objective ([`SpanObjective`]): over spans.
        vocabularies ([`Vocabularies`]): of the two models.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: SpanObjective,
        vocabularies: Vocabularies,
        layers: Sequence[int] = (),
        hidden_weight: float = 0.0,
    ) -> None:
        super().__init__(model, objective.objective, layers, hidden_weight)
        self.span_objective = objective
        self.vocabularies = vocabularies

    def _loss(
        self, hidden: torch.Tensor, head: Head, predictions: Any, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.vocabularies = self.vocabularies.to(hidden.device)
        return tiled_span_loss(
            hidden, head, predictions.source, labels, predictions.alignment, self.vocabularies, self.span_objective
        )

    def _distance(self, layers: list[torch.Tensor], predictions: Any) -> torch.Tensor:
        starts = _starts(predictions.alignment.spans, predictions.alignment.count)
        return super()._distance([layer[starts] for layer in layers], predictions)


__all__ = ["AlignedPredictions", "BridgeStudentLoss"]
