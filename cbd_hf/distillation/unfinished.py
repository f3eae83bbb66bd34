"""A training that stands alone, with its unfinished work beside its output: gone on with only as it was begun."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from cbd_hf._files import atomic_write_text, check_output_directory
from cbd_hf.distillation.recipe import differences
from cbd_hf.distillation.rounds import on_main
from cbd_hf.distillation.stages import BRIDGE_RECORD


RECIPE = "recipe.json"
_CHECKPOINTS = "checkpoint-"


def unfinished_directory(output: Path) -> Path:
    """Where the unfinished work of a training lies."""
    return output.with_name(f"{output.name}.training")


def check_unused(output: Path) -> None:
    """
    Check that a training can go to `output`, or that one has.

    Raises:
        FileExistsError: there is something else.
    """
    if not (output / BRIDGE_RECORD).is_file():
        check_output_directory(output)


def begin(output: Path, recipe: Callable[[], Mapping[str, Any]]) -> dict[str, Any] | None:
    """
    Begin a training, or go on with it.

    Args:
        output (`Path`): where the trained model goes.
        recipe (`Callable`): all that decides what is learnt, as JSON; called on the main process.

    Returns:
        `dict`, *optional*: the record of the training if it is finished.

    Raises:
        FileExistsError: `output`, or the directory of unfinished work, holds something else.
        ValueError: what was begun there differs from the recipe; says in what.
    """
    return on_main(PartialState(), lambda: _begin(output, json.loads(json.dumps(recipe(), default=str))))


def _begin(output: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    unfinished = unfinished_directory(output)
    names = {path.name for path in unfinished.iterdir()} if unfinished.is_dir() else set()
    if (output / BRIDGE_RECORD).is_file():
        record = json.loads((output / BRIDGE_RECORD).read_text(encoding="utf-8"))
        if record.get("recipe") == recipe:
            if RECIPE in names or all(name.startswith(_CHECKPOINTS) for name in names):
                shutil.rmtree(unfinished, ignore_errors=True)  # killed while it removed it
            return record
        raise FileExistsError(
            f"{output} holds a finished training that differs from this one:\n  "
            + "\n  ".join(differences(record.get("recipe") or {}, recipe))
            + "\nChoose another output_dir."
        )
    check_output_directory(output)
    if RECIPE in names:
        changed = differences(json.loads((unfinished / RECIPE).read_text(encoding="utf-8")), recipe)
        if changed and not any(name.startswith(_CHECKPOINTS) for name in names):
            atomic_write_text(unfinished / RECIPE, json.dumps(recipe, indent=1) + "\n")  # nothing is lost
        elif changed:
            raise ValueError(
                f"The training that was begun in {unfinished} differs from this one:\n  "
                + "\n  ".join(changed)
                + f"\nGive the same options to go on with it, choose another output_dir, or remove {unfinished} to "
                "start anew (nothing was changed)."
            )
    elif names or unfinished.is_file():
        raise FileExistsError(
            f"{unfinished}, where the unfinished work of {output} lies, holds something else; nothing was changed. "
            "Choose another output_dir."
        )
    else:
        unfinished.mkdir(parents=True, exist_ok=True)
        atomic_write_text(unfinished / RECIPE, json.dumps(recipe, indent=1) + "\n")
    return None


__all__ = ["RECIPE", "begin", "check_unused", "unfinished_directory"]
