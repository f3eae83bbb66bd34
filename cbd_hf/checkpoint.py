"""Lazy, read-only access to the tensors of a Hugging Face checkpoint directory (safetensors only)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from cbd_hf._conversion import Recipe, loading_recipes


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Of a tensor that is stacked from many, this many bytes are made at a time, which takes up to three times as much
# memory besides the tensor's own.
_BLOCK = 1 << 25
# Pages of a file that were read stay in memory as long as its mapping: about so many bytes, and a tensor.
_KEPT = 1 << 25
_CONVERSION_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
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


class _Header(NamedTuple):
    """What a file says of one of its tensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name

    @property
    def num_bytes(self) -> int:
        bits = 8 if self.dtype == "BOOL" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * bits // 8


class CheckpointReader:
    """
    Reads single tensors of a checkpoint by their parameter name, without loading the rest.

    Names are those of the model's `state_dict()`. With `model`, whatever `from_pretrained` can load is read under
    them: tensors stored under other names, experts stored one by one, the backbone alone, one of two tied weights. A
    tensor that is stored in another form is converted when it is read, from its own sources alone.

    Without `model`, tensors are read as they are stored; only checkpoints that were saved from the backbone alone (the
    Hub's `gpt2` is one: `h.0...` where the model says `transformer.h.0...`) are read under the model's names.

    Args:
        directory (`str` or `Path`): the checkpoint.
        base_model_prefix (`str`, *optional*, defaults to `""`): the model class's prefix of the backbone. Not used
            with `model`, which has its own.
        model (`PreTrainedModel`, *optional*): the checkpoint's model, on the meta device.

    Raises:
        CheckpointError: see [`weight_files`]; also for a file that is truncated or is not safetensors.
    """

    def __init__(
        self, directory: str | Path, base_model_prefix: str = "", *, model: PreTrainedModel | None = None
    ) -> None:
        from safetensors import SafetensorError, safe_open

        self.directory = Path(directory)
        self._prefix = f"{base_model_prefix}." if base_model_prefix else ""
        self._model = model
        self._headers: dict[str, _Header] = {}
        for path in weight_files(directory):
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    for name in file.keys():
                        entry = file.get_slice(name)
                        self._headers[name] = _Header(path, tuple(entry.get_shape()), entry.get_dtype())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}).") from error
        self._sources: dict[str, str | Recipe] = {}  # of a model's tensors
        if model is not None:
            self._sources.update(self._stored_as_they_are(model))
        if model is not None and not self._sources:
            for name, recipe in loading_recipes(model, self._headers).items():
                self._sources[name] = recipe.names[0] if recipe.converter is None else recipe
        self._outlines: dict[str, torch.Tensor] = {}
        self._file: tuple[Path, Any] | None = None  # the one read last, and what has been read of its mapping
        self._mapped = 0

    def _stored_as_they_are(self, model: PreTrainedModel) -> dict[str, str]:
        """
        Where the model's tensors are if each weight is stored under its own name, or one of them, and shape; else {}.

        Whatever transformers converts differs in one of them; its conversions, which take longer to look up than small
        models to read, are then not asked for.
        """
        sources: dict[str, str] = {}
        first: dict[int, str] = {}  # of the names of tied weights
        saved = model.state_dict().keys()
        weights = model.named_parameters(remove_duplicate=False)
        for name, weight in [*weights, *model.named_buffers(remove_duplicate=False)]:
            if name in saved:
                stored = name if name in self._headers else first.get(id(weight), "")
                if stored not in self._headers or self._headers[stored].shape != tuple(weight.shape):
                    return {}
                sources[name] = first.setdefault(id(weight), stored)
        return sources

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`, from the files' headers alone."""
        source = self._require(name)
        return self._headers[source].shape if isinstance(source, str) else tuple(self._outline(name, source).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of tensor `name`, from the files' headers alone."""
        source = self._require(name)
        return self._dtype(source) if isinstance(source, str) else self._outline(name, source).dtype

    def num_bytes(self, name: str) -> int:
        """Bytes of tensor `name` in its stored dtype, from the files' headers alone."""
        source = self._require(name)
        return self._headers[source].num_bytes if isinstance(source, str) else self._outline(name, source).nbytes

    def stored(self, name: str) -> list[tuple[Path, str]]:
        """The tensors in files, as (file, stored name), that tensor `name` is made from."""
        source = self._require(name)
        names = [source] if isinstance(source, str) else source.names
        return [(self._headers[stored].file, stored) for stored in names]

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """
        Tensor `name` on the CPU in its stored dtype, or its rows `start:stop` (of dimension 0, as in a slice).

        It may map the file: do not change it in place. The file is mapped anew after some tens of megabytes, so that
        what was read leaves memory.

        Of a tensor that is stacked from many, such as experts, only those of the wanted rows are read; any other
        conversion is done whole.

        Raises:
            CheckpointError: the checkpoint lacks it, or stores it in a form that cannot be converted.
        """
        source = self._require(name)
        rows = slice(None)
        if start is not None or stop is not None:
            shape = self.shape(name)
            if not shape:
                raise ValueError(f"Tensor {name} in {self.directory} is a scalar and has no rows.")
            rows = slice(*slice(start, stop).indices(shape[0])[:2])
        return self._load([source], rows)[source] if isinstance(source, str) else self._convert(name, source, rows)

    def _find(self, name: str) -> str | Recipe | None:
        if self._model is not None:
            return self._sources.get(name)
        return next((stored for stored in (name, name.removeprefix(self._prefix)) if stored in self._headers), None)

    def _require(self, name: str) -> str | Recipe:
        source = self._find(name)
        if source is None:
            raise CheckpointError(f"The checkpoint {self.directory} has no tensor {name}.")
        return source

    def _dtype(self, stored: str) -> torch.dtype:
        import torch

        names = {
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
        }
        dtype = self._headers[stored].dtype
        if dtype not in names:
            raise CheckpointError(
                f"Tensor {stored} in {self.directory} has dtype {dtype}; only {', '.join(names)} are supported. "
                "Save a dequantized checkpoint first."
            )
        return names[dtype]

    def _load(self, names: Iterable[str], rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """Stored tensors by their stored names."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._headers[name].file, []).append(name)
        loaded: dict[str, torch.Tensor] = {}
        for path, group in by_file.items():
            for name in group:
                file = self._opened(path)
                loaded[name] = file.get_tensor(name) if rows == slice(None) else file.get_slice(name)[rows]
                self._mapped += loaded[name].nbytes
        return loaded

    def _opened(self, path: Path) -> Any:
        """The file, mapped anew if the last mapping holds too much or another file."""
        from safetensors import safe_open

        if self._file is None or self._file[0] != path or self._mapped > _KEPT:
            self._file, self._mapped = (path, safe_open(path, framework="pt", device="cpu")), 0
        return self._file[1]

    def _convert(self, name: str, recipe: Recipe, rows: slice) -> torch.Tensor:
        import torch

        outline = self._outline(name, recipe)
        by_row = recipe.row_sources
        if by_row is None:
            made = self._make(name, recipe, self._load(recipe.names))
            # A copy, so that the rest is freed.
            return made if rows == slice(None) else made[rows].clone()
        by_row = by_row[rows]
        made = torch.empty((len(by_row), *outline.shape[1:]), dtype=outline.dtype)
        step = max(1, _BLOCK * outline.shape[0] // max(1, outline.nbytes))
        for first in range(0, len(by_row), step):
            sources = [source for row in by_row[first : first + step] for source in row]
            part = replace(recipe, sources=sources)
            made[first : first + step] = self._make(name, part, self._load(part.names))
        return made

    def _outline(self, name: str, recipe: Recipe) -> torch.Tensor:
        """A converted tensor on the meta device."""
        import torch

        if name not in self._outlines:
            assert self._model is not None  # only its tensors have recipes
            sources = {
                stored: torch.empty(self._headers[stored].shape, dtype=self._dtype(stored), device="meta")
                for stored in recipe.names
            }
            outline = self._make(name, recipe, sources)
            expected = tuple(self._model.get_parameter_or_buffer(name).shape)
            # One missing expert would otherwise shift all that follow.
            if tuple(outline.shape) != expected:
                raise CheckpointError(
                    f"Tensor {name} has shape {list(expected)} in the model, but {list(outline.shape)} is what "
                    f"{self.directory} has of it, in {len(sources)} tensors from {recipe.names[0]} on."
                )
            self._outlines[name] = outline
        return self._outlines[name]

    def _make(self, name: str, recipe: Recipe, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert self._model is not None and recipe.converter is not None
        try:
            return recipe.convert(self._model, sources)[recipe.output]
        except _CONVERSION_ERRORS as error:
            raise CheckpointError(
                f"Tensor {name} cannot be made by {recipe.converter.operations} of the {len(recipe.names)} tensors "
                f"that {self.directory} has of it, from {recipe.names[0]} on ({type(error).__name__}: {error}). If "
                "from_pretrained can load the checkpoint, save_pretrained(..., save_original_format=False) writes one "
                "that needs no conversion."
            ) from error

    def close(self) -> None:
        """Forget the files; nothing can be read any more."""
        self._headers.clear()
        self._sources.clear()
        self._file = None

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["CheckpointError", "CheckpointReader", "weight_files"]
