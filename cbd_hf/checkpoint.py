"""Lazy, read-only access to the tensors of a Hugging Face checkpoint directory (safetensors only)."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointError(ValueError):
    """A checkpoint directory that is incomplete, damaged or in a format this package refuses to read."""


def weight_files(directory: str | Path) -> list[Path]:
    """
    The safetensors files that hold the weights of a checkpoint, in shard order.

    Args:
        directory (`str` or `Path`): a directory with `model.safetensors`, or with `model.safetensors.index.json` and
            the shards that it names.

    Raises:
        CheckpointError: no safetensors weights (pickled weights are named and refused), or a shard is missing.
    """
    directory = Path(directory)
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a valid safetensors index: {error}.") from error
        if not names or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{index} is not a valid safetensors index: its weight_map must name files.")
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{index} names files outside the checkpoint: {', '.join(outside)}.")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(f"{directory} lacks the weight file(s) {', '.join(missing)} named in {INDEX_FILE}.")
        return [directory / name for name in names]
    pickled = sorted(path.name for pattern in _PICKLED_PATTERNS for path in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{directory} holds only pickled weights ({', '.join(pickled)}), which can run code when they are loaded. "
            "Convert them once in a place you trust: AutoModelForCausalLM.from_pretrained(path).save_pretrained(new)."
        )
    raise CheckpointError(f"{directory} holds no weights: expected {SINGLE_FILE} or {INDEX_FILE}.")


class CheckpointReader:
    """
    Reads single tensors of a checkpoint by their parameter name, without loading the rest.

    Names are those of the model's `state_dict()`. Checkpoints that were saved from the backbone alone (the Hub's
    `gpt2` is one: `h.0...` where the model says `transformer.h.0...`) are read under the model's names.

    Args:
        directory (`str` or `Path`): the checkpoint.
        base_model_prefix (`str`, *optional*, defaults to `""`): the model class's prefix of the backbone.

    Raises:
        CheckpointError: see [`weight_files`]; also for a file that is truncated or is not safetensors.
    """

    def __init__(self, directory: str | Path, base_model_prefix: str = "") -> None:
        from safetensors import SafetensorError, safe_open

        self.directory = Path(directory)
        self._prefix = f"{base_model_prefix}." if base_model_prefix else ""
        self._owner: dict[str, Path] = {}
        for path in weight_files(directory):
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    self._owner.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}).") from error

    def _stored_name(self, name: str) -> str | None:
        if name in self._owner:
            return name
        bare = name.removeprefix(self._prefix)
        return bare if bare in self._owner else None

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`, from the file's header alone."""
        return self._header(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of tensor `name`, from the file's header alone."""
        import torch

        names = {
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
        }
        stored = self._header(name)[1]
        if stored not in names:
            raise CheckpointError(
                f"Tensor {name} in {self.directory} has dtype {stored}; only {', '.join(names)} are supported. "
                "Save a dequantized checkpoint first."
            )
        return names[stored]

    def read(self, name: str) -> torch.Tensor:
        """
        Tensor `name` on the CPU in its stored dtype. It maps the file: do not change it in place.

        The file is opened for this tensor alone, so that its pages leave memory with the tensor.

        Raises:
            CheckpointError: the checkpoint lacks it.
        """
        from safetensors import safe_open

        stored = self._require(name)
        with safe_open(self._owner[stored], framework="pt", device="cpu") as file:
            return file.get_tensor(stored)

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        from safetensors import safe_open

        stored = self._require(name)
        with safe_open(self._owner[stored], framework="pt", device="cpu") as file:
            entry = file.get_slice(stored)
            return tuple(entry.get_shape()), entry.get_dtype()

    def _require(self, name: str) -> str:
        stored = self._stored_name(name)
        if stored is None:
            raise CheckpointError(f"The checkpoint {self.directory} has no tensor {name}.")
        return stored

    def close(self) -> None:
        """Forget the files; nothing can be read any more."""
        self._owner.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["CheckpointError", "CheckpointReader", "weight_files"]
