"""What each device needs to distil one model into another, from their configs alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cbd_hf.planning import check_positions
from cbd_hf.training_memory.recording import ACTIVATIONS, COPIES, LOSS, TEACHER, Recording
from cbd_hf.training_memory.sharding import (
    COMMUNICATION,
    GATHERED,
    GRADIENTS,
    OPTIMIZER,
    SHARDINGS,
    TEACHER_WEIGHTS,
    WEIGHTS,
    Division,
    peak_memory,
)


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

DEVICES = ("cpu", "cuda")
PARTS = (
    WEIGHTS,
    GATHERED,
    COPIES,
    GRADIENTS,
    OPTIMIZER,
    TEACHER_WEIGHTS,
    TEACHER,
    ACTIVATIONS,
    LOSS,
    COMMUNICATION,
)
"""Parts of a device's memory; their sum at one moment is what a device holds."""

_DTYPES = ("float32", "bfloat16", "float16")
_TOKENS_PER_PASS = 2048  # of the trainer on a CPU


@dataclass(frozen=True)
class TrainingWorkload:
    """
    How a stage is trained; the options are those of [`StepwiseDistillationConfig`] and of `accelerate launch`.

    Args:
        dtype (`str`, *optional*, defaults to `"float32"`): of the computation: `"float32"`, `"bfloat16"` or
            `"float16"` (mixed precision; AdamW's weights and moments stay in float32).
        max_length (`int`, *optional*, defaults to 1024): tokens of every sequence, all supervised: the worst case.
        per_device_train_batch_size (`int`, *optional*, defaults to 1): sequences of a micro-batch.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): micro-batches of a step.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`): as in the trainer.
        teacher_placement (`str`, *optional*, defaults to `"auto"`): `"auto"`, `"replicate"`, `"shard"`, `"offload"`.
        teacher_dtype (`str`, *optional*): by default what the student computes in; `"auto"`: that of its config.
        device (`str`, *optional*, defaults to `"cuda"`): `"cpu"` or `"cuda"`.

    Raises:
        ValueError: one of them is out of its range.
    """

    dtype: str = "float32"
    max_length: int = 1024
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    teacher_placement: str = "auto"
    teacher_dtype: str | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        from cbd_hf.distillation.placement import PLACEMENTS

        choices = {
            "dtype": _DTYPES,
            "teacher_placement": PLACEMENTS,
            "teacher_dtype": (None, "auto", *_DTYPES),
            "device": DEVICES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(value) for value in allowed if value is not None)
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {listed}.")
        for name, least in (
            ("max_length", 2),  # the first token is not predicted
            ("per_device_train_batch_size", 1),
            ("gradient_accumulation_steps", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")


@dataclass(frozen=True)
class StageMemory:
    """
    Memory of one device in one stage. `dataclasses.asdict` makes a JSON object of it.

    Args:
        teacher (`str`): its name.
        student (`str`): its name.
        zero_stage (`str`): one of `SHARDINGS`.
        world_size (`int`): devices.
        teacher_placement (`str`): `"replicate"`, `"shard"` or `"offload"`.
        phase (`str`): in which the memory is most: the `"teacher"`'s forward pass, the student's `"forward"` pass with
            the loss, the `"backward"` pass, or the optimizer's `"update"`.
        parts (`dict[str, int]`): bytes of each of `PARTS` at that moment.
        total (`int`): their sum.
    """

    teacher: str
    student: str
    zero_stage: str
    world_size: int
    teacher_placement: str
    phase: str
    parts: dict[str, int]
    total: int


def predict_stage(
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    workload: TrainingWorkload | None = None,
    *,
    zero_stages: Iterable[str] = ("0",),
    world_sizes: Iterable[int] = (1,),
    names: tuple[str, str] = ("teacher", "student"),
) -> list[StageMemory]:
    """
    Predict the peak of one device's memory for each world size and way to divide a stage.

    The micro-batch is run once on tensors without memory, by the trainer's own code, and what it allocates is
    replayed for every division. docs/planning.md compares the results with measurements.

    Args:
        teacher (`PretrainedConfig`): of a causal LM.
        student (`PretrainedConfig`): of a causal LM of the same vocabulary.
        workload ([`TrainingWorkload`], *optional*): by default `TrainingWorkload()`.
        zero_stages (`Iterable[str]`, *optional*, defaults to `("0",)`): of `SHARDINGS`.
        world_sizes (`Iterable[int]`, *optional*, defaults to `(1,)`): numbers of devices.
        names (`tuple[str, str]`, *optional*): of teacher and student.

    Raises:
        ValueError: an unknown ZeRO stage or world size, a placement that is impossible with it, or a sequence longer
            than the learned positions.
    """
    workload = workload or TrainingWorkload()
    shardings, sizes = [str(stage) for stage in zero_stages], list(world_sizes)
    check_divisions(shardings, sizes, workload)
    for config in (teacher, student):
        check_positions(config, workload.max_length, "max_length")
    recordings: dict[tuple[bool, int], Recording] = {}
    return [
        _predict(teacher, student, workload, sharding, world_size, names, recordings)
        for world_size in sizes
        for sharding in shardings
    ]


def predict_chain(
    configs: Mapping[str, PretrainedConfig],
    workload: TrainingWorkload | None = None,
    *,
    zero_stages: Sequence[str] = ("0",),
    world_sizes: Sequence[int] = (1,),
) -> list[StageMemory]:
    """
    The same for every stage of a chain: each model is the teacher of the next.

    Args:
        configs (`Mapping[str, PretrainedConfig]`): by name, largest first.
        workload, zero_stages, world_sizes: see [`predict_stage`].

    Raises:
        ValueError: fewer than two models; see also [`predict_stage`].
    """
    if len(configs) < 2:
        raise ValueError(
            f"A stage needs a teacher and a student, but there is only {', '.join(configs) or 'nothing'}: add the "
            "source or another anchor."
        )
    names = list(configs)
    return [
        memory
        for large, small in zip(names, names[1:], strict=False)
        for memory in predict_stage(
            configs[large],
            configs[small],
            workload,
            zero_stages=zero_stages,
            world_sizes=world_sizes,
            names=(large, small),
        )
    ]


def check_divisions(zero_stages: Sequence[str], world_sizes: Sequence[int], workload: TrainingWorkload) -> None:
    """Raise a `ValueError` for a ZeRO stage or world size out of range, or a placement that does not go with it."""
    if not zero_stages or not world_sizes:
        raise ValueError("Name at least one zero_stage and one world_size.")
    for sharding in zero_stages:
        if sharding not in SHARDINGS:
            raise ValueError(f"zero_stage={sharding!r} is unknown; choose one or several of {', '.join(SHARDINGS)}.")
        if sharding == "3" and workload.teacher_placement == "replicate":
            raise ValueError(
                "teacher_placement='replicate' is not possible under ZeRO-3, which shards every model that is loaded: "
                "choose 'shard' or 'offload', or leave out zero_stage 3."
            )
    for size in world_sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"world_size={size!r} must be a whole number of at least 1.")


def _predict(
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    workload: TrainingWorkload,
    sharding: str,
    world_size: int,
    names: tuple[str, str],
    recordings: dict[tuple[bool, int], Recording],
) -> StageMemory:
    placement = workload.teacher_placement
    if placement == "auto":
        placement = "shard" if sharding in ("3", "fsdp2") else "replicate"
    # DeepSpeed and FSDP compute with weights of two bytes, and not by autocast over float32 ones.
    low = sharding != "0" and workload.dtype != "float32"
    rows, accumulates = workload.per_device_train_batch_size, workload.gradient_accumulation_steps > 1
    if workload.device == "cpu" and sharding == "0":
        fitting = max(1, _TOKENS_PER_PASS // workload.max_length)
        rows, accumulates = min(rows, fitting), accumulates or rows > fitting
    if (low, rows) not in recordings:
        recordings[low, rows] = _record(teacher, student, workload, rows, low)
    division = Division(sharding, world_size, placement, workload.device, accumulates)
    found, phase = peak_memory(recordings[low, rows], division)
    parts = {part: found.get(part, 0) for part in PARTS}
    return StageMemory(*names, sharding, world_size, placement, phase, parts, sum(parts.values()))


def _record(
    teacher: PretrainedConfig, student: PretrainedConfig, workload: TrainingWorkload, rows: int, low: bool
) -> Recording:
    import torch

    from cbd_hf.training_memory.step import Batch, record_step

    dtype = getattr(torch, workload.dtype)
    batch = Batch(
        rows=rows,
        length=workload.max_length,
        student_dtype=dtype if low else torch.float32,
        autocast=dtype if dtype != torch.float32 and not low else None,
        teacher_dtype=_teacher_dtype(teacher, workload),
        gradient_checkpointing=workload.gradient_checkpointing,
        device=workload.device,
    )
    return record_step(student, teacher, batch)


def _teacher_dtype(teacher: PretrainedConfig, workload: TrainingWorkload) -> torch.dtype:
    """As [`StepwiseDistillationConfig.teacher_torch_dtype`] resolves it."""
    import torch

    name = workload.teacher_dtype
    if name is None:
        name = "auto" if workload.dtype == "float32" and workload.device != "cpu" else workload.dtype
    if name != "auto":
        return getattr(torch, name)
    return teacher.dtype if isinstance(teacher.dtype, torch.dtype) else torch.float32


__all__ = [
    "DEVICES",
    "PARTS",
    "StageMemory",
    "TrainingWorkload",
    "check_divisions",
    "predict_chain",
    "predict_stage",
]
