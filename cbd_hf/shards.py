"""Writing a model's weights one tensor at a time, in the files that `save_pretrained` would write."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cbd_hf._conversion import SavedForm, tied_names
from cbd_hf._files import atomic_write_text, sync_directory
from cbd_hf.checkpoint import INDEX_FILE, SINGLE_FILE


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


_SHARD = "model-{:05d}-of-{:05d}.safetensors"


class ShardWriter:
    """
    Writes a checkpoint's weights without ever holding more than one shard of them.

    Tensors come in any order under the names of the model's `state_dict()`, and are stored in the form that
    `save_pretrained` writes and `from_pretrained` and other libraries read: experts one by one where the family's
    checkpoints are so, tied weights once. Configs are left to the caller.

    Use it as a context manager: the files get their names when the block ends, and all of them or, after an error,
    none. A shard's tensors are in memory until it is full; a tensor that is larger than a shard is one by itself.

    Args:
        directory (`str` or `Path`): where to write; made if needed. It must not hold weights.
        model (`PreTrainedModel`): the model without weights (on the meta device).
        max_shard_size (`int` or `str`, *optional*, defaults to `"1GB"`): bytes, or a number with a unit.
        metadata (`Mapping[str, str]`, *optional*): of every file. By default `{"format": "pt"}`, which others want.

    Attributes:
        names (`list[str]`): the tensors to add, in the model's order. Persistent buffers are among them.

    Raises:
        FileExistsError: the directory holds weights.
        ValueError: `max_shard_size` is not a positive size.
    """

    def __init__(
        self,
        directory: str | Path,
        model: PreTrainedModel,
        max_shard_size: int | str = "1GB",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        from transformers.utils.hub import convert_file_size_to_int

        self.directory = Path(directory)
        self._limit = convert_file_size_to_int(max_shard_size)
        if self._limit <= 0:
            raise ValueError(f"max_shard_size={max_shard_size} is not a positive size such as '1GB'.")
        present = [
            path.name
            for pattern in ("model.safetensors*", "model-*.safetensors")
            for path in self.directory.glob(pattern)
        ]
        if present:
            raise FileExistsError(f"{directory} already holds weights ({', '.join(sorted(present))}). Choose another.")
        self._form = SavedForm(model)
        self.names = self._form.names
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._missing = set(self.names)
        self._added: set[str] = set()
        self._kept = {
            alias: name for group in tied_names(model) for name in group if name in self._missing for alias in group
        }
        self._n_params = model.num_parameters()
        self._metadata = dict(metadata) if metadata is not None else {"format": "pt"}
        self._pending: dict[str, dict[str, torch.Tensor]] = {}  # of each conversion, by its key
        self._shard: dict[str, torch.Tensor] = {}
        self._size = 0  # of the shard and what is pending
        self._total = 0
        self._written: list[tuple[Path, list[str]]] = []
        self._mark = f".tmp-{uuid.uuid4().hex[:12]}"
        self._closed = False
        self.directory.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """
        Take one tensor, and write a shard if it fills one.

        It may be kept without a copy until then, so it must not be changed any more.

        Args:
            name (`str`): its name in the model. Of tied weights each name will do; the second is ignored.
            tensor (`torch.Tensor`): any dtype and device, the model's shape.

        Raises:
            ValueError: the model has no such tensor or it has another shape, or it was added before.
        """
        if self._closed:
            raise ValueError(f"The weights in {self.directory} are closed: {name} comes too late.")
        wanted = self._kept.get(name, name)
        if wanted not in self._form.recipes:
            raise ValueError(f"{name} is not among what is saved of the model.")
        if tensor.shape != self._shapes[wanted]:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the model's is {list(self._shapes[wanted])}.")
        if name in self._added:
            raise ValueError(f"{name} was added before.")
        self._added.add(name)
        if wanted not in self._missing:
            return
        recipe = self._form.recipes[wanted]
        pending = self._pending.setdefault(recipe.key, {})
        if self._shard and self._size + tensor.nbytes > self._limit:
            self._flush()  # before the conversion, which makes copies
        pending[wanted] = tensor.detach().cpu()
        self._missing.remove(wanted)
        self._size += tensor.nbytes
        if not self._missing.isdisjoint(recipe.names):
            return
        del self._pending[recipe.key], tensor
        made = self._form.convert(recipe, pending)
        self._size -= sum(source.nbytes for source in pending.values())
        pending.clear()
        taken = {other.untyped_storage().data_ptr() for other in self._shard.values()}
        for stored in list(made):
            self._put(stored, made.pop(stored), taken, shared=recipe.converter is not None)

    def _put(self, stored: str, tensor: torch.Tensor, taken: set[int], shared: bool) -> None:
        import torch

        if self._shard and self._size + tensor.nbytes > self._limit:
            self._flush()
        storage = tensor.untyped_storage()
        # What a conversion makes lies side by side in one storage; any other part of a larger one would keep it in
        # memory. The same storage twice in one file is refused by safetensors.
        part = not shared and storage.nbytes() > tensor.nbytes
        if not tensor.is_contiguous() or part or storage.data_ptr() in taken:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._shard[stored] = tensor
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self.directory / f".model-{len(self._written) + 1:05d}{self._mark}.safetensors"
        self._written.append((path, list(self._shard)))
        save_file(self._shard, path, metadata=self._metadata)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        self._size -= sum(tensor.nbytes for tensor in self._shard.values())
        self._shard = {}

    def close(self) -> list[Path]:
        """
        Write the last shard, and give all files their names: `model.safetensors`, or numbered shards and their index.

        Returns:
            `list[Path]`: the files, the index last.

        Raises:
            ValueError: tensors are missing. Nothing is left behind.
        """
        if self._closed:
            return []
        final: list[Path] = []
        try:
            if self._missing:
                missing = [name for name in self.names if name in self._missing]
                raise ValueError(
                    f"{len(missing)} of {len(self.names)} tensors of the model were not added: "
                    f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
                )
            if self._shard:
                self._flush()
            count = len(self._written)
            weight_map: dict[str, str] = {}
            for number, (path, stored) in enumerate(self._written, 1):
                final.append(self.directory / (SINGLE_FILE if count == 1 else _SHARD.format(number, count)))
                os.replace(path, final[-1])
                weight_map |= dict.fromkeys(stored, final[-1].name)
            if count > 1:
                final.append(self.directory / INDEX_FILE)
                metadata = {"total_parameters": self._n_params, "total_size": self._total}
                index = {"metadata": metadata, "weight_map": weight_map}
                atomic_write_text(final[-1], json.dumps(index, indent=2, sort_keys=True) + "\n")
            sync_directory(self.directory)
        except BaseException:
            for path in final:
                path.unlink(missing_ok=True)
            self.abort()
            raise
        self._closed = True
        return final

    def abort(self) -> None:
        """Remove what was written."""
        if self._closed:
            return
        self._closed = True
        self._pending.clear()
        self._shard.clear()
        for path, _ in self._written:
            path.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


__all__ = ["ShardWriter"]
