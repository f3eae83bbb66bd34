"""Train from the last complete checkpoint, and save the result whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer, TrainerCallback

from cbd_hf._files import explain_full_disk, merge_directory
from cbd_hf.distillation.checkpoints import (
    last_complete_checkpoint,
    mark_complete,
    remove_incomplete,
    rotate,
    unmark,
)
from cbd_hf.distillation.guards import LossError, last_good


class _WholeCheckpoints(TrainerCallback):
    """
    Marks a checkpoint when all processes have written it, and only then deletes older ones.

    Trainer deletes the older ones first, in which a kill can hit the only one that is whole.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # As they were while the checkpoint was written; a finished training would write it once more.
        control.should_save = control.should_log = control.should_evaluate = False
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._prepare(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._prepare(args, state, control)

    def _prepare(self, args: Any, state: Any, control: Any) -> None:
        # There may be one of the same step, from a run that was resumed from an older one.
        if control.should_save and state.is_world_process_zero:
            unmark(_path(args, state))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        bad = _not_finite(model)
        if any(gather_object([bool(bad)])):
            raise LossError(
                f"Step {state.global_step}: weights are not finite any more ({', '.join(bad[:3])}). "
                f"The checkpoint is not used.\n{last_good(args.output_dir, state.global_step)}"
            )
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            mark_complete(_path(args, state))
            rotate(args.output_dir, self.limit, keep=state.best_model_checkpoint)


def _path(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _not_finite(model: torch.nn.Module | None) -> list[str]:
    """Names of the parameters, or of this process's shards of them, that hold something not finite."""
    parameters = model.named_parameters() if model is not None else ()
    return [name for name, p in parameters if not bool(torch.isfinite(getattr(p, "ds_tensor", p)).all())]


def train_resumably(trainer: Trainer, checkpoint: str | None = None, *, own_directory: bool = False) -> Any:
    """
    Train, from a checkpoint or from the start, with checkpoints of which a kill at any moment leaves one whole.

    Args:
        trainer (`Trainer`): ready to train.
        checkpoint (`str`, *optional*): where to resume; see [`last_complete_checkpoint`].
        own_directory (`bool`, *optional*, defaults to `False`): `output_dir` belongs to this training alone: resume
            from its last complete checkpoint, and delete what is left of others.

    Returns:
        `TrainOutput`: what `trainer.train` returns.

    Raises:
        DiskFullError: a checkpoint does not fit on the disk. The one before is whole.
        LossError: weights that are not finite any more were about to be saved.
    """
    directory = Path(str(trainer.args.output_dir))
    if own_directory:
        if PartialState().is_main_process:
            remove_incomplete(directory)
        (checkpoint,) = broadcast_object_list([last_complete_checkpoint(directory)])
    trainer.add_callback(_WholeCheckpoints(trainer.args.save_total_limit))
    trainer.args.save_total_limit = None
    take = trainer.get_batch_samples

    def take_if_unfinished(*args: Any, **kwargs: Any) -> Any:
        # Trainer takes one step more when it resumes a training that is finished, within an epoch.
        return ([], None) if trainer.state.global_step >= trainer.state.max_steps else take(*args, **kwargs)

    trainer.get_batch_samples = take_if_unfinished  # type: ignore[method-assign]
    with explain_full_disk(directory, "Free some space and run the same again: it resumes from the last checkpoint."):
        return trainer.train(resume_from_checkpoint=checkpoint)


def save_whole(output: Path, save: Callable[[Path], None], keys: Sequence[str] = ()) -> None:
    """
    Let all processes together save something, which appears as `output` in one step.

    Args:
        output (`Path`): where to.
        save (`Callable[[Path], None]`): called on every process with a directory to write into.
        keys (`Sequence[str]`, *optional*): see [`merge_directory`], for an `output` that holds other things.

    Raises:
        DiskFullError: it does not fit on the disk; `output` is as it was.
    """
    state = PartialState()
    partial = output.with_name(f"{output.name}.partial")
    if state.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    state.wait_for_everyone()
    try:
        with explain_full_disk(partial, f"{output} is as it was. Free some space and run the same again."):
            save(partial)
            state.wait_for_everyone()
            if state.is_main_process:
                merge_directory(partial, output, keys)
    except BaseException:
        if state.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    state.wait_for_everyone()


__all__ = ["save_whole", "train_resumably"]
