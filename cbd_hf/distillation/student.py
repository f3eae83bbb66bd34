"""The student's side of the loss, computed inside the forward of whatever wraps it (DDP, DeepSpeed, FSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cbd_hf._trl import ForwardRedirection, disable_dropout_in_model
from cbd_hf.distillation.heads import Parts, parts_or_warning, picked, run_backbone, unwrapped
from cbd_hf.distillation.objectives import Objective
from cbd_hf.distillation.predictions import Head, Predictions
from cbd_hf.distillation.tiles import tiled_loss


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cbd_hf.distillation.cache import TeacherCache
    from cbd_hf.distillation.config import StepwiseDistillationConfig

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
            projection(state.to(next(projection.parameters()).dtype))
            for projection, state in zip(self.layers, states, strict=True)
        ]


def add_projection(
    model: Any,
    args: StepwiseDistillationConfig,
    teacher: PretrainedConfig | None,
    cache: TeacherCache | None,
    peft_config: Any = None,
) -> tuple[list[int], list[int]]:
    """
    Give a student the [`HiddenProjection`] that the options ask for.

    Args:
        model (`PreTrainedModel`): the student, without an adapter.
        args ([`StepwiseDistillationConfig`]): options.
        teacher (`PretrainedConfig`, *optional*): of the teacher; not needed with a cache.
        cache ([`TeacherCache`], *optional*): in place of the teacher.
        peft_config (`PeftConfig`, *optional*): of the adapter to come; the projection is added to what it trains.

    Returns:
        `tuple[list[int], list[int]]`: the layers to match, of student and teacher, counted from 1.

    Raises:
        ValueError: there are no such layers, or the cache has not their hidden states.
    """
    if not args.hidden_loss_weight:
        return [], []
    if hasattr(model, "peft_config"):
        raise ValueError("hidden_loss_weight needs the plain model: give the adapter as peft_config.")
    config = model.config.get_text_config()
    depth, layers = config.num_hidden_layers, args.hidden_loss_layers or [config.num_hidden_layers]
    if not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"hidden_loss_layers={layers} must be between 1 and {depth}, the student's layers.")
    if cache is not None:
        manifest = cache.manifest
        width = manifest.teacher.hidden_size if manifest.settings.hidden else 0
        if not width or layers != [depth]:
            raise ValueError(
                f"hidden_loss_layers={layers} are not in the cache {args.teacher_cache}: build it with hidden "
                f"states, which are the last layer's, and match layer {depth} only."
            )
        matched = [depth]
    else:
        assert teacher is not None
        other: Any = teacher.get_text_config()
        width = other.hidden_size
        matched = [max(1, round(layer * other.num_hidden_layers / depth)) for layer in layers]
    projection = HiddenProjection(config.hidden_size, width, len(layers), args.seed)
    model.add_module(PROJECTION, projection.to(model.device))
    if peft_config is not None:  # else the adapter's wrapper would freeze it and not save it
        peft_config.modules_to_save = [*(getattr(peft_config, "modules_to_save", None) or []), PROJECTION]
    return list(layers), matched


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
        self.parts = parts_or_warning(model, "student")
        if layers and self.parts is None:
            raise ValueError(
                "hidden_loss_weight cannot be used with this student: its hidden states are not known to be what its "
                "head reads. A head among an adapter's modules_to_save is one reason."
            )

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
            logits = picked(wrapped(**inputs, use_cache=False).logits, chosen)
            total, divergence = self._compare(logits, Head(), predictions, labels)
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
        last, *layers = (picked(state, chosen) for state in states)

        def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self._compare(hidden, parts.head_of(parts.head), predictions, labels)

        # By the head's own call, whose hooks gather the weights of a sharded student.
        total, divergence = ForwardRedirection()(parts.head, parts.head, loss, last)
        hidden = divergence.new_zeros(())
        if self.layers:
            distance = self._distance([state.to(labels.device) for state in layers], predictions)
            total = total + self.hidden_weight * distance
            hidden = distance.detach()
        return total, divergence, hidden

    def _compare(
        self, hidden: torch.Tensor, head: Head, predictions: Predictions, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        here = labels.device
        device = hidden.device if head.weight is None else head.weight.device
        if device != here:  # a student split over devices, whose head lies on another one than its inputs
            predictions = predictions.to(device)
        values = self._loss(hidden.to(device), head, predictions, labels.to(device))
        total, divergence = (value.to(here) for value in values)
        return total, divergence

    def _loss(
        self, hidden: torch.Tensor, head: Head, predictions: Predictions, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return tiled_loss(hidden, head, predictions, labels, self.objective)

    def _distance(self, layers: list[torch.Tensor], predictions: Predictions) -> torch.Tensor:
        # Through the model's attribute: an adapter's wrapper may have put its own module there.
        projections: Any = getattr(unwrapped(self.model), PROJECTION)
        distances = [
            (projected.float() - target.float()).square().mean(-1).sum()
            for projected, target in zip(projections(layers), predictions.layers, strict=True)
        ]
        return torch.stack(distances).mean()


def disable_dropout(model: nn.Module) -> None:
    """Also what modules keep as a number and pass on, such as OPT's dropout and Llama's `attention_dropout`."""
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


__all__ = ["PROJECTION", "HiddenProjection", "LossParts", "StudentLoss", "add_projection", "disable_dropout"]
