"""Where a trainer's teacher predictions come from: a live model, or a cache of what one said."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from cbd_hf._trl import ForwardRedirection
from cbd_hf.distillation.batching import TEACHER_PREFIX
from cbd_hf.distillation.heads import decoder_layers, parts_or_warning, picked, run_backbone, unwrapped
from cbd_hf.distillation.placement import place_teacher
from cbd_hf.distillation.predictions import DensePredictions, Head, Predictions, SparsePredictions


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


class TeacherSource(ABC):
    """
    Says what the teacher predicts at the supervised positions of a batch.

    Args:
        hidden_size (`int`): of the teacher's hidden states.
        layers (`Sequence[int]`): the teacher's layers whose hidden states are to be matched, counted from 1.
    """

    hidden_size: int
    layers: tuple[int, ...] = ()

    @abstractmethod
    def predict(
        self, inputs: dict[str, torch.Tensor], chosen: torch.Tensor, cached: dict[str, torch.Tensor]
    ) -> Predictions:
        """
        Predictions without gradient.

        Args:
            inputs (`dict[str, torch.Tensor]`): of the model's forward, shape (rows, length) each.
            chosen (`torch.Tensor`): bool, shape (rows, length): positions whose next token is supervised.
            cached (`dict[str, torch.Tensor]`): the batch's entries from a cache, in the order of `chosen`'s positions.
        """


class LiveTeacher(TeacherSource):
    """
    Runs the teacher's backbone on every batch; its head is left to the loss, tile by tile.

    Args:
        teacher (`PreTrainedModel`): placed here.
        accelerator (`Accelerator`): the student's.
        placement (`str`, *optional*, defaults to `"auto"`): see [`place_teacher`].
        layers (`Sequence[int]`, *optional*): see [`TeacherSource`].
        compile_layers (`bool`, *optional*, defaults to `False`): `torch.compile` its decoder layers.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        accelerator: Accelerator,
        placement: str = "auto",
        layers: Sequence[int] = (),
        compile_layers: bool = False,
    ) -> None:
        self.parts = parts_or_warning(teacher, "teacher")
        if layers and self.parts is None:
            raise ValueError(
                f"hidden_loss_weight cannot be used with this {teacher.config.model_type}: its hidden states are not "
                "known to be what its head reads."
            )
        self.accelerator = accelerator
        self.layers = tuple(layers)
        self.hidden_size = teacher.config.get_text_config().hidden_size
        self.model = place_teacher(teacher, accelerator, placement)
        if compile_layers:
            compile_decoder_layers(teacher)
        # Sharded weights are gathered into tensors that other code may touch, which inference mode forbids.
        self._no_grad = (
            torch.inference_mode if self.model is teacher and accelerator.num_processes == 1 else torch.no_grad
        )

    def predict(
        self, inputs: dict[str, torch.Tensor], chosen: torch.Tensor, cached: dict[str, torch.Tensor]
    ) -> Predictions:
        with self._no_grad(), self.accelerator.autocast():
            parts = self.parts
            if parts is None:
                logits = self.model(**inputs, use_cache=False).logits
                return DensePredictions(picked(logits, chosen).to(chosen.device), Head().open)
            states = ForwardRedirection()(
                self.model, parts.model, lambda **kwargs: run_backbone(parts, kwargs, self.layers), **inputs
            )
            last, *layers = (picked(state, chosen) for state in states)
        layers = [layer.clone() for layer in layers]
        return DensePredictions(last, parts.open_head, tuple(layers)).to(chosen.device)


class CachedTeacher(TeacherSource):
    """
    Hands on what the collator has read from a cache. No model is needed.

    Args:
        vocab (`int`): entries of the cached softmax.
        hidden_size (`int`, *optional*, defaults to 0): of the cached hidden states.
        layers (`Sequence[int]`, *optional*): see [`TeacherSource`]; a cache has the last layer only.
    """

    def __init__(self, vocab: int, hidden_size: int = 0, layers: Sequence[int] = ()) -> None:
        self.vocab = vocab
        self.hidden_size = hidden_size
        self.layers = tuple(layers)

    def predict(
        self, inputs: dict[str, torch.Tensor], chosen: torch.Tensor, cached: dict[str, torch.Tensor]
    ) -> Predictions:
        values = {name.removeprefix(TEACHER_PREFIX): value for name, value in cached.items()}
        expected, found = int(chosen.sum()), len(values["token_ids"])
        if found != expected:
            raise ValueError(f"The cache holds {found} positions of this batch, but {expected} are supervised.")
        return SparsePredictions(
            values["token_ids"],
            values["log_probs"],
            tail=values.get("tail"),
            weights=values.get("weights"),
            vocab=self.vocab,
            layers=(values["hidden"],) if self.layers else (),
            labels=values.get("labels"),
        )


def compile_decoder_layers(model: Any) -> None:
    """`torch.compile` each decoder layer in place: they share one compilation, which a whole model's would not."""
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"compile_layers=True, but {type(unwrapped(model)).__name__} does not name its decoder layers."
        )
    for layer in layers:
        layer.compile()


__all__ = ["CachedTeacher", "LiveTeacher", "TeacherSource", "compile_decoder_layers"]
