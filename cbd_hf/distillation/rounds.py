"""Files that several processes make in turns, such as a teacher's predictions or a source's answers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from cbd_hf._files import explain_full_disk
from cbd_hf._loading import plain_loading
from cbd_hf.data.sources import resolve_checkpoint
from cbd_hf.distillation.records import ShardRecord


T = TypeVar("T")

_CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


class ShardList(Protocol):
    """A manifest that lists shards."""

    shards: list[ShardRecord]

    def write(self, directory: Path) -> None:
        """Write the manifest in one step."""


def make_shards(
    state: PartialState,
    directory: Path,
    manifest: ShardList,
    todo: np.ndarray,
    size: int,
    make: Callable[[int, np.ndarray], ShardRecord],
    *,
    description: str,
    progress: bool = True,
) -> None:
    """
    Make the missing shards in rounds: each process makes one, then the main process adds them all to the manifest.

    After an error the manifest has what lies in front of the first row that failed: rows behind it are made again.

    Args:
        state (`PartialState`): the processes.
        directory (`Path`): where the manifest is written after each round.
        manifest ([`ShardList`]): the shards that exist; grows.
        todo (`np.ndarray`): int64, shape (n,), the rows that are missing, in order.
        size (`int`): rows of a shard.
        make (`Callable`): writes the shard of a number with some rows, and describes it.
        description (`str`): before the progress bar.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Raises:
        DiskFullError: no space is left. Other errors are those of `make`.
    """
    first = len(manifest.shards)
    parts = [todo[start : start + size] for start in range(0, len(todo), size)]
    silent = not (progress and state.is_main_process)
    with (
        explain_full_disk(directory, "Free some space and run the same again: whole shards are kept."),
        tqdm(total=len(todo), desc=description, unit="row", disable=silent) as bar,
    ):
        for begin in range(0, len(parts), state.num_processes):
            mine = begin + state.process_index
            outcome: ShardRecord | Exception | None = None
            if mine < len(parts):
                try:
                    outcome = make(first + mine, parts[mine])
                except Exception as error:
                    if state.num_processes == 1:
                        raise
                    outcome = error
            results = gather_object([outcome])
            whole = list(itertools.takewhile(lambda result: not isinstance(result, Exception), results))
            manifest.shards += [result for result in whole if result is not None]
            if state.is_main_process:
                manifest.write(directory)
            if len(whole) < len(results):
                raise results[len(whole)]
            bar.update(sum(map(len, parts[begin : begin + state.num_processes])))


def on_main(state: PartialState, function: Callable[[], T]) -> T:
    """The result of a function that only the main process calls, on all of them; or its error."""
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            if state.num_processes == 1:
                raise
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def local_checkpoint(model: str | os.PathLike[str], trust_remote_code: bool = False) -> Path:
    """The directory of a checkpoint that a user names, downloaded from the Hub if it is there."""
    source = resolve_checkpoint(model)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = _CHECKPOINT_FILES if trust_remote_code else _CHECKPOINT_FILES[:-1]
    return Path(snapshot_download(source, allow_patterns=patterns))


def load_model(checkpoint: Path, dtype: str, state: PartialState, options: dict[str, Any]) -> Any:
    """A causal language model on the process's device, or where `device_map` among the options puts it."""
    from transformers import AutoModelForCausalLM

    with plain_loading():  # each process generates or predicts by itself
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype), **options)
    return model if "device_map" in options else model.to(state.device)


__all__ = ["ShardList", "load_model", "local_checkpoint", "make_shards", "on_main"]
