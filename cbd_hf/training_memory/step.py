"""One micro-batch of a distillation stage, run on tensors without memory by the trainer's own code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cbd_hf._loading import plain_loading
from cbd_hf._trl import disable_dropout_in_model
from cbd_hf.distillation import tiles
from cbd_hf.distillation.heads import find_parts, run_backbone
from cbd_hf.distillation.objectives import Objective
from cbd_hf.distillation.predictions import DensePredictions, Head
from cbd_hf.distillation.student import StudentLoss
from cbd_hf.training_memory.recording import (
    ACTIVATIONS,
    LOSS,
    STUDENT_ROLE,
    TEACHER,
    TEACHER_ROLE,
    Event,
    Recorder,
    Recording,
    watch,
)


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TEACHER_PHASE, FORWARD_PHASE, BACKWARD_PHASE, UPDATE_PHASE = "teacher", "forward", "backward", "update"


@dataclass(frozen=True)
class Batch:
    """
    A micro-batch and how it is computed.

    Args:
        rows (`int`): sequences.
        length (`int`): tokens of each; all but the first are supervised.
        student_dtype (`torch.dtype`): of the weights that the student computes with.
        autocast (`torch.dtype`, *optional*): type of computation over float32 weights.
        teacher_dtype (`torch.dtype`): of the teacher's weights.
        gradient_checkpointing (`bool`): whether layers are computed again in the backward pass.
        device (`str`): `"cpu"` or `"cuda"`: how large the tiles of the loss are.
    """

    rows: int
    length: int
    student_dtype: torch.dtype
    autocast: torch.dtype | None
    teacher_dtype: torch.dtype
    gradient_checkpointing: bool
    device: str


def record_step(student: PretrainedConfig, teacher: PretrainedConfig, batch: Batch) -> Recording:
    """
    The allocations of the teacher's forward pass, the student's, the loss and the backward pass.

    Args:
        student (`PretrainedConfig`): of a causal LM.
        teacher (`PretrainedConfig`): of a causal LM with the student's vocabulary.
        batch ([`Batch`]): what they run on.
    """
    fake = FakeTensorMode()
    with fake:
        small = _model(student, batch.student_dtype).train()
        large = _model(teacher, batch.teacher_dtype).eval().requires_grad_(False)
    # Outside: it looks at the numbers of a very small model.
    parts = find_parts(large)
    loss = StudentLoss(small, Objective())
    if batch.gradient_checkpointing:
        small.activation_checkpointing_enable()
    disable_dropout_in_model(small)
    recorder = Recorder()
    weights, teacher_weights = watch(small, STUDENT_ROLE, recorder), watch(large, TEACHER_ROLE, recorder)
    if loss.parts is not None:
        _watch_loss(loss.parts.head, recorder)
    autocast = torch.autocast("cpu", batch.autocast) if batch.autocast is not None else nullcontext()
    with fake, recorder, _tiles_of(batch.device):
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        # The trainer's mask picks the same positions; how many it does is not known without numbers.
        positions = torch.arange(batch.rows * (batch.length - 1))
        chosen: Any = (positions // (batch.length - 1), positions % (batch.length - 1))
        labels = torch.zeros_like(positions)
        with autocast:
            recorder.phase(TEACHER_PHASE)
            with recorder.allocating(TEACHER), torch.no_grad():
                if parts is None:
                    logits = large(input_ids=ids, use_cache=False).logits[chosen]
                    predictions = DensePredictions(logits, Head().open)
                else:
                    (last,) = (state[chosen] for state in run_backbone(parts, {"input_ids": ids}))
                    predictions = DensePredictions(last, _recorded_head(parts, large, recorder))
                    del last
            recorder.phase(FORWARD_PHASE)
            total = loss(small, {"input_ids": ids}, chosen, labels, predictions).total
        del predictions, labels, chosen, positions
        recorder.phase(BACKWARD_PHASE)
        with warnings.catch_warnings():  # about hooks of modules whose inputs have no gradient, which is fine here
            warnings.simplefilter("ignore", UserWarning)
            total.backward()
        del total
        recorder.phase(UPDATE_PHASE)
        events = recorder.stop()
    return Recording(
        replace(weights, uses=_uses(events, STUDENT_ROLE)),
        replace(teacher_weights, uses=_uses(events, TEACHER_ROLE)),
        events,
    )


def _model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with plain_loading(), no_init_weights():
        copy = type(config).from_dict(config.to_dict())
        model = AutoModelForCausalLM.from_config(copy, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model


def _uses(events: list[Event], role: str) -> tuple[tuple[int, ...], ...]:
    return tuple(event.members for event in events if event.kind == "use" and event.name == role)


def _watch_loss(head: torch.nn.Module, recorder: Recorder) -> None:
    """What is allocated inside the head's call is the loss's: tiles, and the head's gradient."""

    def begin(*_: Any) -> None:
        recorder.part = LOSS

    def end(*_: Any) -> None:
        recorder.part = ACTIVATIONS

    head.register_forward_pre_hook(begin)
    head.register_forward_hook(end)


def _recorded_head(parts: Any, teacher: PreTrainedModel, recorder: Recorder) -> Any:
    numbers = {id(parameter): index for index, parameter in enumerate(teacher.parameters())}
    own = tuple(numbers[id(parameter)] for parameter in parts.head.parameters(recurse=False))

    @contextmanager
    def open_head() -> Iterator[Head]:
        recorder.use(TEACHER_ROLE, own)
        with parts.open_head() as head:
            yield head
        recorder.used(TEACHER_ROLE, own)

    return open_head


@contextmanager
def _tiles_of(device: str) -> Iterator[None]:
    """Tiles as large as on `device`; the tensors that are recorded say they are on the CPU."""
    before = dict(tiles._TILE_VALUES)
    if device != "cpu":
        tiles._TILE_VALUES["cpu"] = tiles._TILE_VALUES_ELSEWHERE
    try:
        yield
    finally:
        tiles._TILE_VALUES.update(before)


__all__ = ["BACKWARD_PHASE", "FORWARD_PHASE", "TEACHER_PHASE", "UPDATE_PHASE", "Batch", "record_step"]
