"""The student's side of the loss, computed inside the forward of whatever wraps it (DDP, DeepSpeed, FSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cbd_hf._trl import ForwardRedirection
from cbd_hf.distillation.heads import Parts, find_parts, run_backbone, unwrapped
from cbd_hf.distillation.objectives import Objective
from cbd_hf.distillation.predictions import Head, Predictions
from cbd_hf.distillation.tiles import tiled_loss


PROJECTION = "cbd_hidden_projection"  # of the student, while it is trained


@dataclass(frozen=True)
class LossParts:
    """
    Sums over the supervised positions of a micro-batch; float32 scalars.

    Args:
        total (`torch.Tensor`): what is minimised, before it is divided by the number of tokens of the global batch.
        divergence (`torch.Tensor`): without its weight; no gradient.
        hidden (`torch.Tensor`): distance of the hidden states, without its weight; no gradient.
    """

    total: torch.Tensor
    divergence: torch.Tensor
    hidden: torch.Tensor


class HiddenProjection(nn.Module):
    """
    One learned matrix for each matched layer: student hidden -> teacher hidden, without bias.

    Args:
        student (`int`): hidden size.
        teacher (`int`): hidden size.
        count (`int`): number of layers.
        seed (`int`): of the orthogonal start; of equal sizes it is the identity.
    """

    def __init__(self, student: int, teacher: int, count: int, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(student, teacher, bias=False) for _ in range(count))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for projection in self.layers:
                if student == teacher:
                    nn.init.eye_(projection.weight)  # type: ignore[arg-type]
                else:
                    nn.init.orthogonal_(projection.weight)  # type: ignore[arg-type]

    def forward(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Project one state per layer; shape (positions, student hidden) -> (positions, teacher hidden)."""
        return [
            projection(state.to(projection.weight.dtype))
            for projection, state in zip(self.layers, states, strict=True)
        ]


class StudentLoss:
    """
    Runs a student and compares it with its teacher's predictions.

    Args:
        model (`nn.Module`): the student without what accelerate wraps around it; an adapter's wrapper stays.
        objective ([`Objective`]): of the distributions.
        layers (`Sequence[int]`, *optional*): layers whose hidden states are matched, counted from 1; the student then
            has a [`HiddenProjection`].
        hidden_weight (`float`, *optional*, defaults to 0.0): of the distance of hidden states: the squared difference,
            mean over channels and layers, of `projection(student)` to the teacher's.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, layers: Sequence[int] = (), hidden_weight: float = 0.0
    ) -> None:
        self.model = model
        self.objective = objective
        self.layers = tuple(layers)
        self.hidden_weight = hidden_weight
        self.parts = find_parts(model)

    def __call__(
        self,
        wrapped: nn.Module,
        inputs: dict[str, torch.Tensor],
        chosen: torch.Tensor,
        labels: torch.Tensor,
        predictions: Predictions,
    ) -> LossParts:
        """
        Args:
            wrapped (`nn.Module`): what accelerate made of the student.
            inputs (`dict[str, torch.Tensor]`): of its forward, shape (rows, length) each.
            chosen (`torch.Tensor`): bool, shape (rows, length): positions whose next token is supervised.
            labels (`torch.Tensor`): int64, shape (positions,): those tokens.
            predictions: of the teacher, for the same positions.
        """
        if self.parts is None:  # the model's own forward makes the logits
            logits = wrapped(**inputs, use_cache=False).logits[chosen]
            total, divergence = tiled_loss(logits, Head(), predictions, labels, self.objective)
            return LossParts(total, divergence, divergence.new_zeros(()))
        values = ForwardRedirection()(
            wrapped,
            self.model,
            lambda **kwargs: self._inside(self.parts, kwargs, chosen, labels, predictions),  # type: ignore[arg-type]
            **inputs,
        )
        return LossParts(*values)

    def _inside(
        self,
        parts: Parts,
        inputs: dict[str, torch.Tensor],
        chosen: torch.Tensor,
        labels: torch.Tensor,
        predictions: Predictions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states = run_backbone(parts, inputs, self.layers)
        last, *layers = (state[chosen] for state in states)

        def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return tiled_loss(hidden, parts.head_of(parts.head), predictions, labels, self.objective)

        # By the head's own call, whose hooks gather the weights of a sharded student.
        total, divergence = ForwardRedirection()(parts.head, parts.head, loss, last)
        hidden = divergence.new_zeros(())
        if self.layers:
            distance = self._distance(layers, predictions)
            total = total + self.hidden_weight * distance
            hidden = distance.detach()
        return total, divergence, hidden

    def _distance(self, layers: list[torch.Tensor], predictions: Predictions) -> torch.Tensor:
        # Through the model's attribute: an adapter's wrapper may have put its own module there.
        projections: Any = getattr(unwrapped(self.model), PROJECTION)
        distances = [
            (projected.float() - target.float()).square().mean(-1).sum()
            for projected, target in zip(projections(layers), predictions.layers, strict=True)
        ]
        return torch.stack(distances).mean()


__all__ = ["PROJECTION", "HiddenProjection", "LossParts", "StudentLoss"]
