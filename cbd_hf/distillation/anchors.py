"""A trained student as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from cbd_hf._loading import plain_loading
from cbd_hf.distillation.heads import unwrapped
from cbd_hf.distillation.student import PROJECTION


def write_anchor(student: Any, state: dict[str, torch.Tensor], output_dir: str | Path) -> None:
    """
    Save gathered weights in a fresh model of the student's class, an adapter merged, no projection.

    Args:
        student (`PreTrainedModel` or `PeftModel`): whose weights they are; only its configs are read.
        state (`dict[str, torch.Tensor]`): all its weights, by their names in it.
        output_dir (`str` or `Path`): of the checkpoint.

    Raises:
        RuntimeError: weights are missing, or there are others.
    """
    state = {name: value for name, value in state.items() if PROJECTION not in name}
    config = type(student.config).from_dict(student.config.to_dict() | {"use_cache": True})
    with plain_loading():
        base: Any = _own_class(student)._from_config(config, dtype=next(iter(state.values())).dtype)
    base.generation_config = student.generation_config
    if hasattr(student, "peft_config"):
        from peft import get_peft_model

        merged: Any = get_peft_model(base, student.active_peft_config, autocast_adapter_dtype=False)
        merged.load_state_dict(state)
        base = merged.merge_and_unload()
    else:
        loaded = base.load_state_dict(state, strict=False)  # a tied head may be missing, nothing else
        missing = {name for name, _ in base.named_parameters()} & set(loaded.missing_keys)
        if missing or loaded.unexpected_keys:
            raise RuntimeError(f"Gathering the student lost {missing} and added {loaded.unexpected_keys}.")
    base.save_pretrained(output_dir)


def check_savable(student: Any) -> None:
    """
    Raise for a student that [`write_anchor`] could not save, before it is trained.

    Raises:
        ValueError: its weights are quantized.
    """
    if getattr(student.config, "quantization_config", None) is not None:
        raise ValueError(
            "The student's weights are quantized (quantization_config), so that an adapter cannot be merged into them "
            "for an anchor: load it without quantization_config. The teacher may be quantized."
        )


def _own_class(student: Any) -> Any:
    """The class of the model below an adapter, as it was before `fully_shard` made one of it."""
    return next(kind for kind in type(unwrapped(student)).__mro__ if not issubclass(kind, FSDPModule))


__all__ = ["check_savable", "write_anchor"]
