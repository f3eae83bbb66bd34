"""Trans: one anchor brought to the target's shape, tensor by tensor (paper Eq. 3)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

from cbd_hf.checkpoint import CheckpointError
from cbd_hf.layout import Family, Shape, TensorSpec
from cbd_hf.transforms.depth import LayerMap
from cbd_hf.transforms.selection import First, Selection
from cbd_hf.transforms.width import Growth, Index, Part, WidthMap, pads_with_mean, place


if TYPE_CHECKING:
    import torch

Expansion = Literal["identity", "replicate"]
EXPANSIONS: tuple[Expansion, ...] = ("identity", "replicate")


class Reader(Protocol):
    """Where tensors come from: a checkpoint's files, or a state dict."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`; raises `CheckpointError` where there is none."""
        ...

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """Tensor `name`, or its rows from `start` to `stop`; not to be changed in place."""
        ...


@dataclass(frozen=True)
class StateDict:
    """
    A [`Reader`] of tensors in memory.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): by the model's parameter names.
    """

    tensors: Mapping[str, torch.Tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        """See [`Reader.shape`]."""
        if name not in self.tensors:
            raise CheckpointError(f"There is no tensor {name}.")
        return tuple(self.tensors[name].shape)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """See [`Reader.read`]."""
        return self.tensors[name][start:stop] if start is not None else self.tensors[name]


@dataclass(frozen=True)
class Trans:
    """
    Structural transformation of one anchor to the target's shape, read lazily.

    Args:
        reader (`Reader`): the anchor's weights.
        family (`Family`): its layout.
        source (`Shape`): the anchor's shape.
        target (`Shape`): the target's shape.
        layers (`LayerMap`): where each target layer comes from.
        expansion (`"identity"` or `"replicate"`, *optional*, defaults to `"identity"`): what stands where the anchor
            has no layer: its neighbour with zeroed output projections, which leaves the function unchanged, or a
            plain copy of the neighbour, which does not.
        selection (`Selection`, *optional*): what a narrower target keeps; by default the first coordinates.
        growth (`"pad"` or `"clone"`, *optional*, defaults to `"pad"`): what a wider target gets; see [`WidthMap`].
    """

    reader: Reader
    family: Family
    source: Shape
    target: Shape
    layers: LayerMap
    expansion: Expansion = "identity"
    selection: Selection = First()
    growth: Growth = "pad"

    @cached_property
    def widths(self) -> WidthMap:
        """The coordinates of every axis."""
        return WidthMap(self.family, self.source, self.target, self.selection, self.growth)

    def inserted(self, name: str) -> bool:
        """Whether target parameter `name` lies in a layer that this anchor does not have."""
        layer, _ = self.family.split(name)
        return layer is not None and self.layers.inserted[layer]

    def source_name(self, name: str) -> str:
        """The anchor's parameter that target parameter `name` is made from."""
        layer, local = self.family.split(name)
        return name if layer is None else self.family.join(self.layers.sources[layer], local)

    def check(self, weights: Mapping[str, torch.Tensor]) -> None:
        """
        Find out, from the files' headers alone, that every target parameter can be made.

        Args:
            weights (`Mapping[str, torch.Tensor]`): the target's, which may be on the meta device.

        Raises:
            CheckpointError: the anchor lacks a tensor; its layers do not correspond to the target's.
            ValueError: a stored shape does not fit the anchor's config, or the target's config the family's layout.
        """
        for name, weight in weights.items():
            spec = self.family.spec(name)
            source_name = self.source_name(name)
            actual = self.reader.shape(source_name)
            wanted = _lengths(self.target, spec, actual)
            if tuple(weight.shape) != wanted:
                raise ValueError(
                    f"{name} of the target has shape {tuple(weight.shape)}, but Trans makes {wanted} of "
                    f"{source_name} in {_place_of(self.reader)}: the config must agree with the anchors in all but "
                    "the dimensions of a chain."
                )
            expected = _lengths(self.source, spec, actual)
            if tuple(actual) != expected:
                raise ValueError(
                    f"{source_name} in {_place_of(self.reader)} has shape {tuple(actual)}, but its config says "
                    f"{expected}."
                )

    def target_shape(self, name: str) -> tuple[int, ...]:
        """Shape of target parameter `name`."""
        return _lengths(self.target, self.family.spec(name), self.reader.shape(self.source_name(name)))

    def splits_by_rows(self, name: str) -> bool:
        """Whether [`Trans.tensor`] can give some rows of `name` without reading all of it."""
        spec = self.family.spec(name)
        if not spec.axes:
            return False
        if self.growth == "clone" and (spec.axes[0].side == "in" or spec.norm is not None):
            return False  # how many copies share a weight is counted over all rows
        index = self._indices(name, spec)[0]
        return not (index.has_new and pads_with_mean(spec, 0))

    def tensor(
        self,
        name: str,
        fill: torch.Tensor | None = None,
        rows: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """
        The anchor's contribution to target parameter `name`, in the target's shape. Not to be changed in place: it
        may be `fill` itself or share the memory that the next read of the same tensor returns.

        Args:
            name (`str`): the target's parameter.
            fill (`torch.Tensor`, *optional*): values in the target's shape (its `rows`) for the coordinates, or whole
                inserted layers, that the anchor lacks and that cannot change its function; see [`resize`].
            rows (`tuple[int, int]`, *optional*): only these rows of the target's parameter; by default all.
            dtype (`torch.dtype`, *optional*): of the result and of the arithmetic; by default float32.

        Raises:
            CheckpointError: the anchor lacks the tensor.
        """
        import torch

        spec = self.family.spec(name)
        identity_block = self.expansion == "identity" and self.inserted(name)
        if identity_block and fill is not None and not spec.block_output:
            return fill
        indices = self._indices(name, spec)
        source_name = self.source_name(name)
        if rows is None:
            tensor = self.reader.read(source_name)
        else:
            tensor, first = self._some_rows(source_name, indices[0].rows(*rows))
            indices = [first, *indices[1:]]
        if tensor.is_floating_point():
            tensor = tensor.to(dtype or torch.float32)
        tensor = place(tensor, spec, self.widths, indices, fill)
        return torch.zeros_like(tensor) if identity_block and spec.block_output else tensor

    def corners(
        self, name: str, rows: tuple[int, int] | None = None
    ) -> list[tuple[tuple[slice, ...], torch.Tensor]] | None:
        """
        Target parameter `name` (its `rows`) as blocks, one for each combination of its axes' segments: where the block
        lies, and what the anchor stores for its first coordinates in every axis, which may map the file. `None` if
        [`Trans.tensor`] does more than to pad these.

        Blending needs no copy of such a parameter, which are nearly all: prefixes of channels, heads and units.
        """
        spec = self.family.spec(name)
        if self.growth != "pad" or spec.norm is not None or not spec.axes:
            return None
        if (spec.width_power or spec.pad_power) and self.source.hidden != self.target.hidden:
            return None
        layer, _ = self.family.split(name)
        source_layer = None if layer is None else self.layers.sources[layer]
        source_name = self.source_name(name)
        by_axis: list[list[Part]] = []
        for axis, length in zip(spec.axes, self.reader.shape(source_name), strict=True):
            parts = self.widths.parts(axis, source_layer, length)
            if parts is None:
                return None
            by_axis.append(parts)
        if rows is not None:
            by_axis[0] = [inside for part in by_axis[0] if (inside := part.rows(*rows)) is not None]
        empty = self.expansion == "identity" and self.inserted(name)
        blocks = []
        for combination in itertools.product(*by_axis):
            place = tuple(slice(part.start, part.start + part.length) for part in combination)
            blocks.append((place, self._stored(source_name, combination, empty)))
        return blocks

    def _stored(self, source_name: str, parts: tuple[Part, ...], empty: bool) -> torch.Tensor:
        count = 0 if empty else parts[0].existing
        if count:
            tensor = self.reader.read(source_name, parts[0].source, parts[0].source + count)
        else:
            tensor = self.reader.read(source_name, 0, 1)[:0]
        for dim, part in enumerate(parts[1:], start=1):
            tensor = tensor.narrow(dim, part.source, part.existing)
        return tensor

    def _indices(self, name: str, spec: TensorSpec) -> list[Index]:
        layer, _ = self.family.split(name)
        source_layer = None if layer is None else self.layers.sources[layer]
        shape = self.reader.shape(self.source_name(name))
        return [self.widths.index(axis, source_layer, length) for axis, length in zip(spec.axes, shape, strict=True)]

    def _some_rows(self, source_name: str, index: Index) -> tuple[torch.Tensor, Index]:
        """The anchor's rows that `index` names, and the same index counted from the first of these."""
        existing = [entry for entry in index.entries if entry >= 0]
        low, high = (min(existing), max(existing) + 1) if existing else (0, 1)
        tensor = self.reader.read(source_name, low, high)
        return tensor, Index([entry - low if entry >= 0 else entry for entry in index.entries], high - low)


def _lengths(shape: Shape, spec: TensorSpec, actual: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of a parameter's axes in a model of this shape; those that no dimension moves are as they are."""
    if len(actual) != len(spec.axes):
        return (-1,) * len(spec.axes)
    return tuple(
        length if axis.is_fixed else shape.length(axis) for axis, length in zip(spec.axes, actual, strict=True)
    )


def _place_of(reader: Reader) -> object:
    return getattr(reader, "directory", "memory")


__all__ = ["EXPANSIONS", "Expansion", "Reader", "StateDict", "Trans"]
