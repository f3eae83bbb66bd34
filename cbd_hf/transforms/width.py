"""Width: resize single tensors, axis by axis, by what each axis means."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cbd_hf.layout import Axis, Family, Segment, Shape, TensorSpec
from cbd_hf.layout.axes import HEAD_ROLES
from cbd_hf.layout.heads import matching_heads
from cbd_hf.transforms.selection import First, Selection


if TYPE_CHECKING:
    import torch

NEW = -1  # in an index: a coordinate that the anchor does not have
Growth = Literal["pad", "clone"]
GROWTHS: tuple[Growth, ...] = ("pad", "clone")


@dataclass(frozen=True)
class WidthMap:
    """
    For every axis of the target, the anchor's coordinate that each entry takes.

    Args:
        family (`Family`): the layout of both.
        source (`Shape`): the anchor's.
        target (`Shape`): the target's.
        selection (`Selection`): what a subset keeps.
        growth (`"pad"` or `"clone"`): what stands at coordinates that the anchor lacks: neutral values, or copies of
            the ones it has, whose readers share the weight between them (HyperCloning, arXiv 2409.12903).

    Raises:
        ValueError: cloning to a hidden size that is no multiple; a norm's statistics would change.
    """

    family: Family
    source: Shape
    target: Shape
    selection: Selection = field(default_factory=First)
    growth: Growth = "pad"
    _cache: dict[tuple, Index] = field(default_factory=dict, repr=False, compare=False)
    _parts_of: dict[tuple, list[Part] | None] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.growth == "clone" and self.target.hidden % self.source.hidden:
            raise ValueError(
                f"Cloning needs a hidden size that is a multiple of {self.source.hidden}, got {self.target.hidden}: "
                "choose such a config, or growth='pad'."
            )

    def index(self, axis: Axis, layer: int | None, length: int) -> Index:
        """
        The coordinates of one axis of a parameter.

        Args:
            axis (`Axis`): its meaning.
            layer (`int`, *optional*): the anchor's layer.
            length (`int`): entries of the anchor's axis.
        """
        if axis.is_fixed:
            return Index(range(length), length)
        key = (axis.segments, layer if self.selection.by_layer else None)
        if key not in self._cache:
            entries, offset = [], 0
            for segment in axis.segments:
                entries += [NEW if i == NEW else offset + i for i in self._segment(segment, layer)]
                offset += self.source.size_of(segment)
            self._cache[key] = Index(entries, offset)
        return self._cache[key]

    def parts(self, axis: Axis, layer: int | None, length: int) -> list[Part] | None:
        """
        The runs of an axis, one for each of its segments, where each takes the first coordinates of the anchor's;
        `None` where one takes others. Arguments as for [`WidthMap.index`].
        """
        if axis.is_fixed:
            return [Part(0, length, 0, length)]
        key = ("parts", axis.segments, layer if self.selection.by_layer else None)
        if key not in self._parts_of:
            found: list[Part] | None = []
            start = source = 0
            for segment in axis.segments:
                size = self.source.size_of(segment) if segment.unit else length
                index = Index(self._segment(segment, layer), size)
                if not index.is_prefix:
                    found = None
                    break
                assert found is not None
                found.append(Part(start, len(index.entries), source, index.existing))
                start, source = start + len(index.entries), source + size
            self._parts_of[key] = found
        return self._parts_of[key]

    def _segment(self, segment: Segment, layer: int | None) -> list[int]:
        role, unit = segment.role, segment.unit
        if role == "fixed":
            return list(range(unit))
        if self.selection.raw and role in HEAD_ROLES:
            return self._raw_entries(segment, layer)
        if role in HEAD_ROLES:
            blocks = self._heads(role, layer)
        elif role == "hidden":
            blocks = self._parts("hidden", None, self.source.hidden, self.target.hidden)
        else:
            blocks = self._parts(role, layer, self.source.count(role), self.target.count(role))
        return [NEW if block == NEW else block * unit + i for block in blocks for i in range(unit)]

    def _parts(self, role: str, layer: int | None, have: int, want: int) -> list[int]:
        if want <= have:
            return list(self.selection.keep(role, layer, have, want))
        if self.growth == "clone":
            return [index % have for index in range(want)]
        return [index if index < have else NEW for index in range(want)]

    def _heads(self, role: str, layer: int | None) -> list[int]:
        """Blocks of one head; query heads move with their key/value head."""
        source, target = self.source, self.target
        if self.family.alibi is not None:
            if role == "key_value" and source.kv_heads == target.kv_heads == 1:
                return [0]
            heads = matching_heads(self.family.alibi, source.heads, target.heads)
            return [NEW if head is None else head for head in heads]
        outer = self._parts("kv_heads", layer, source.kv_heads, target.kv_heads)
        if role == "key_value":
            return outer
        inner = self._parts("group", layer, source.group, target.group)
        size = source.group
        if role == "group":  # query heads of the group, then its key and its value
            size += 2
            inner = [*inner, source.group, source.group + 1]
        return [NEW if NEW in (head, member) else head * size + member for head in outer for member in inner]

    def _raw_entries(self, segment: Segment, layer: int | None) -> list[int]:
        """Entries of heads chosen one by one, of queries, keys and values apart where these are packed by head."""
        source, target = _packed(segment, self.source), _packed(segment, self.target)
        have, want = (Counter(part for part, _ in entries) for entries in (source, target))
        place_of = {entry: index for index, entry in enumerate(source)}
        kept = {part: self._parts(segment.role, layer, have[part], want[part]) for part in want}
        chosen = [(part, kept[part][number]) for part, number in target]
        return [NEW if number == NEW else place_of[part, number] for part, number in chosen]


def _packed(segment: Segment, shape: Shape) -> list[tuple[int, int]]:
    """For each entry of heads: which of the matrices packed in each head it belongs to, and its number there."""
    width = shape.head_dim if segment.unit % shape.head_dim == 0 else segment.unit
    in_head = [0] * shape.group + [1, 2] if segment.role == "group" else list(range(segment.unit // width))
    counts: Counter[int] = Counter()
    entries = []
    for _ in range(shape.count(segment.role)):
        for part in in_head:
            entries += [(part, counts[part] + i) for i in range(width)]
            counts[part] += width
    return entries


@dataclass(frozen=True)
class Part:
    """
    A run of an axis that takes the first coordinates of a run of the anchor's.

    Args:
        start (`int`): its first entry in the target.
        length (`int`): its entries in the target.
        source (`int`): the first of the anchor's entries that it takes.
        existing (`int`): how many it takes; the rest of its entries are new.
    """

    start: int
    length: int
    source: int
    existing: int

    def rows(self, start: int, stop: int) -> Part | None:
        """What lies within entries `start` to `stop` of the target, counted from `start`; `None` if nothing does."""
        low, high = max(self.start, start), min(self.start + self.length, stop)
        if low >= high:
            return None
        skipped = low - self.start
        existing = min(max(self.existing - skipped, 0), high - low)
        return Part(low - start, high - low, self.source + min(skipped, self.existing), existing)


@dataclass
class Index:
    """
    A list of coordinates and what a fast copy needs to know about it.

    Args:
        entries (`Sequence[int]`): the anchor's coordinate or `NEW`, for each of the target's.
        available (`int`): coordinates the anchor has.
    """

    entries: Sequence[int]
    available: int

    def __post_init__(self) -> None:
        if isinstance(self.entries, range):  # long ones, of vocabularies
            self.existing, self.has_new = len(self.entries), False
            self.is_prefix = self.entries.start == 0
            self.is_identity = self.is_prefix and self.existing == self.available
            return
        self.existing = next((i for i, entry in enumerate(self.entries) if entry == NEW), len(self.entries))
        tail = self.entries[self.existing :]
        # The first ones in order, then only new ones: a copy of a block.
        self.is_prefix = list(self.entries[: self.existing]) == list(range(self.existing)) and all(
            i == NEW for i in tail
        )
        self.is_identity = self.is_prefix and self.existing == len(self.entries) == self.available
        self.has_new = NEW in self.entries

    def rows(self, start: int, stop: int) -> Index:
        """The part for entries `start` to `stop` of the target, in the anchor's coordinates."""
        return Index(self.entries[start:stop], self.available)


def resize(
    tensor: torch.Tensor,
    spec: TensorSpec,
    widths: WidthMap,
    layer: int | None = None,
    fill: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Give one parameter of an anchor the target's width.

    Coordinates that both have are kept (heads whole). New coordinates, when padding:

    * that a block or embedding writes into the residual stream: zero under RMSNorm. Under LayerNorm the mean of the
      coordinates that exist, which leaves the stream's mean as it was and scales its variance by d/D whatever the
      input, so that the norm correction below is exact (also with a tied head, where centring the weights is not);
    * of a norm's gain: the mean gain, of its shift: zero. Both only meet coordinates that normalise to zero. Where a
      norm's output is the stream itself (BLOOM's embedding norm) the shift takes its mean;
    * everywhere else: zero.

    With `fill`, new coordinates whose value cannot change the function take it from there ([`TensorSpec.free`]), so
    that they can learn: a unit whose incoming and outgoing weights are both zero gets no gradient.

    A norm's gain is multiplied by sqrt(d/D), for the statistics that the new coordinates dilute (d, D: sizes before,
    after); a subset (D < d) is the exact inverse. When cloning, statistics stay and copies share their readers'
    weight.

    Args:
        tensor (`torch.Tensor`): the anchor's parameter, floating point.
        spec (`TensorSpec`): its meaning.
        widths (`WidthMap`): the coordinates.
        layer (`int`, *optional*): the anchor's layer it belongs to.
        fill (`torch.Tensor`, *optional*): values for the free new coordinates, in the target's shape.

    Returns:
        `torch.Tensor`: of the same dtype; a view of the tensor where that is enough.
    """
    indices = [widths.index(axis, layer, length) for axis, length in zip(spec.axes, tensor.shape, strict=True)]
    return place(tensor, spec, widths, indices, fill)


def place(
    tensor: torch.Tensor, spec: TensorSpec, widths: WidthMap, indices: list[Index], fill: torch.Tensor | None = None
) -> torch.Tensor:
    """[`resize`] with given coordinates, which may be a part of the target's (`indices[0]`) for some of its rows."""
    import torch

    new_by_dim: dict[int, torch.Tensor] = {}
    for dim, (axis, index) in enumerate(zip(spec.axes, indices, strict=True)):
        if index.is_identity:
            continue
        if index.is_prefix and not index.has_new:
            tensor = tensor.narrow(dim, 0, index.existing)
            continue
        if widths.growth == "clone":
            tensor = _cloned(tensor, dim, index, spec, axis)
            continue
        positions = torch.tensor(index.entries)
        new = (positions == NEW).nonzero().flatten()
        padding = _padding(tensor, dim, spec) if len(new) else None
        if index.is_prefix:
            shape = list(tensor.shape)
            shape[dim] = len(index.entries)
            grown = tensor.new_empty(shape)
            grown.narrow(dim, 0, index.existing).copy_(tensor.narrow(dim, 0, index.existing))
            if padding is not None:
                grown.narrow(dim, index.existing, len(new)).copy_(padding)
            tensor = grown
        else:
            tensor = tensor.index_select(dim, positions.clamp(min=0))
            if padding is not None:
                tensor.index_copy_(dim, new, padding.expand(*tensor.shape[:dim], len(new), *tensor.shape[dim + 1 :]))
        new_by_dim[dim] = new
    tensor = _rescaled(tensor, spec, widths)
    if fill is not None and spec.free:
        for dim, new in new_by_dim.items():
            tensor.index_copy_(dim, new, fill.index_select(dim, new).to(tensor.dtype))
    return tensor


def pads_with_mean(spec: TensorSpec, dim: int) -> bool:
    """Whether new coordinates along `dim` are the mean over the old ones, so that all of these must be at hand."""
    if spec.norm is not None:
        return spec.norm_gain or spec.norm.writes_stream
    return spec.mean_padded and spec.axes[dim].roles == ("hidden",) and spec.axes[dim].side == "out"


def _padding(tensor: torch.Tensor, dim: int, spec: TensorSpec) -> torch.Tensor:
    if pads_with_mean(spec, dim):
        return tensor.mean(dim, keepdim=True)
    return tensor.new_zeros(()).expand(*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :])


def _cloned(tensor: torch.Tensor, dim: int, index: Index, spec: TensorSpec, axis: Axis) -> torch.Tensor:
    import torch

    positions = torch.tensor(index.entries)
    tensor = tensor.index_select(dim, positions)
    if axis.side == "in" or spec.norm is not None and spec.norm.before_tied_head:
        copies = torch.bincount(positions, minlength=index.available)[positions].to(tensor.dtype)
        shape = [1] * tensor.dim()
        shape[dim] = -1
        offset = spec.norm.offset if spec.norm is not None and spec.norm_gain else 0.0
        tensor = (tensor + offset) / copies.view(shape) - offset if offset else tensor / copies.view(shape)
    return tensor


def _rescaled(tensor: torch.Tensor, spec: TensorSpec, widths: WidthMap) -> torch.Tensor:
    if widths.selection.raw:
        return tensor
    power = spec.width_power + (spec.pad_power if widths.growth == "pad" else 0.0)
    factor = (widths.source.hidden / widths.target.hidden) ** power
    if spec.norm_gain and spec.norm is not None and widths.growth == "pad":
        factor *= math.sqrt(widths.source.count(spec.norm.role) / widths.target.count(spec.norm.role))
    if factor == 1:
        return tensor
    offset = spec.norm.offset if spec.norm is not None and spec.norm_gain else 0.0
    return (tensor + offset) * factor - offset if offset else tensor * factor


def resized_eps(eps: float, source: Shape, target: Shape) -> float:
    """The norm's epsilon after [`resize`]: scaled by d/D like the variance it is added to."""
    return eps if source.hidden == target.hidden else eps * source.hidden / target.hidden


__all__ = ["GROWTHS", "NEW", "Growth", "Index", "WidthMap", "pads_with_mean", "place", "resize", "resized_eps"]
