"""
Trainer checkpoints that are whole: marked when every file has reached the disk, deleted only after losing the mark.

The mark is a file that lists all others with their sizes. A checkpoint without it, or that lacks one of them, is the
remains of a process that was killed, and is never resumed from.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from cbd_hf._files import atomic_write_text, sync_directory, sync_tree


COMPLETE = "cbd_complete"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(path: Path) -> int | None:
    """The number of steps after which a directory was saved as a checkpoint; `None` if its name is not one's."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def _checkpoints(directory: Path) -> Iterator[tuple[int, Path]]:
    for path in directory.glob("checkpoint-*"):
        step = checkpoint_step(path)
        if step is not None and path.is_dir():
            yield step, path


def mark_complete(checkpoint: Path) -> None:
    """
    Make a checkpoint durable, then mark it. Every process must have written its part.

    Args:
        checkpoint (`Path`): a `checkpoint-<step>` directory without mark.
    """
    sync_tree(checkpoint)
    sync_directory(checkpoint.parent)
    files = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    atomic_write_text(checkpoint / COMPLETE, json.dumps(files, indent=2))


def unmark(checkpoint: Path) -> None:
    """Take the mark off, before anything in the checkpoint is changed or deleted."""
    if (checkpoint / COMPLETE).exists():
        (checkpoint / COMPLETE).unlink()
        sync_directory(checkpoint)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its mark, and every file that the mark lists in its size."""
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        return bool(files) and all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def complete_checkpoints(directory: str | Path) -> list[Path]:
    """The complete checkpoints of a directory, oldest first."""
    return [path for _, path in sorted(_checkpoints(Path(directory))) if is_complete(path)]


def last_complete_checkpoint(directory: str | Path, before: int | None = None) -> str | None:
    """
    The newest complete checkpoint.

    Args:
        directory (`str` or `Path`): the trainer's `output_dir`.
        before (`int`, *optional*): only those of fewer steps.
    """
    for step, path in sorted(_checkpoints(Path(directory)), reverse=True):
        if (before is None or step < before) and is_complete(path):
            return str(path)
    return None


def last_written_checkpoint(directory: str | Path, before: int | None = None) -> str | None:
    """
    The newest checkpoint whose last file is there, marked or not: what a plain `trainer.train()` leaves has no marks.

    Args as in [`last_complete_checkpoint`].
    """
    for step, path in sorted(_checkpoints(Path(directory)), reverse=True):
        if (before is None or step < before) and _is_json(path / TRAINER_STATE_NAME):
            return str(path)
    return None


def _is_json(path: Path) -> bool:
    """Whether a file is there to its end; a full disk may have cut it off."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) is not None
    except (OSError, ValueError):
        return False


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; if that is interrupted, what is left is not complete."""
    unmark(checkpoint)
    shutil.rmtree(checkpoint, ignore_errors=True)


def remove_incomplete(directory: str | Path) -> None:
    """Delete what killed processes left of checkpoints."""
    for _, path in list(_checkpoints(Path(directory))):
        if not is_complete(path):
            discard(path)


def rotate(directory: str | Path, limit: int | None, keep: str | None = None) -> None:
    """
    Delete the oldest complete checkpoints.

    Args:
        directory (`str` or `Path`): the trainer's `output_dir`.
        limit (`int`, *optional*): how many stay, at least the newest; without it, or with 0, all.
        keep (`str`, *optional*): one more that stays, such as the best.
    """
    if not limit or limit < 1:
        return
    for path in complete_checkpoints(directory)[:-limit]:
        if keep is None or path.resolve() != Path(keep).resolve():
            discard(path)


__all__ = [
    "COMPLETE",
    "checkpoint_step",
    "complete_checkpoints",
    "discard",
    "is_complete",
    "last_complete_checkpoint",
    "last_written_checkpoint",
    "mark_complete",
    "remove_incomplete",
    "rotate",
    "unmark",
]
