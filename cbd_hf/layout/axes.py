"""The words for what a parameter's axes mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


Side = Literal["in", "out", "none"]
Group = Literal["embeddings", "attention", "ffn", "norms"]
GROUPS: tuple[Group, ...] = ("embeddings", "attention", "ffn", "norms")

HEAD_ROLES = ("query", "key_value", "group")


@dataclass(frozen=True)
class Segment:
    """
    A run of coordinates along an axis that belong to one dimension.

    Args:
        role (`str`): `"hidden"`; `"query"` (by query head, grouped by key/value head), `"key_value"` (by key/value
            head), `"group"` (by key/value head: its query heads, then its key and its value); `"ffn"` or
            `"ffn:<config attribute>"`; `"fixed"`.
        unit (`int`): consecutive entries per head or unit; of a fixed segment its size, or 0 where it is the whole
            axis, whatever its length (vocabulary, positions, experts).
    """

    role: str
    unit: int = 1


@dataclass(frozen=True)
class Axis:
    """
    One axis of a parameter.

    Args:
        segments (`tuple[Segment, ...]`): laid end to end; more than one where a tensor is packed, such as q|k|v.
        side (`"in"`, `"out"` or `"none"`): whether the layer reads these coordinates or produces them.
    """

    segments: tuple[Segment, ...]
    side: Side

    @property
    def is_fixed(self) -> bool:
        """Whether no dimension of a chain moves it."""
        return all(segment.role == "fixed" for segment in self.segments)

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of every segment."""
        return tuple(segment.role for segment in self.segments)


@dataclass(frozen=True)
class Norm:
    """
    A normalisation and the dimension that it runs over.

    Args:
        kind (`"rms"` or `"layer"`): without or with subtraction of the mean.
        role (`str`): the dimension.
        offset (`float`): what is added to the stored gain before use; 1 for Gemma.
        writes_stream (`bool`): its output is the residual stream itself, not what a block reads.
        before_tied_head (`bool`): its output meets the embedding as output head.
    """

    kind: Literal["rms", "layer"]
    role: str
    offset: float = 0.0
    writes_stream: bool = False
    before_tied_head: bool = False


@dataclass(frozen=True)
class TensorSpec:
    """
    Meaning of one parameter.

    Args:
        axes (`tuple[Axis, ...]`): one entry per axis, in storage order.
        group (`str`): the kind of part it belongs to, one of `GROUPS`.
        norm (`Norm`, *optional*): of a norm's gain or shift over a dimension that varies.
        norm_gain (`bool`): the multiplicative weight of `norm`.
        block_output (`bool`): belongs to a projection whose output a block adds to the residual stream. A block whose
            such parameters are all zero is the identity.
        feeds_norm (`bool`): what it produces is normalised over all its coordinates.
        mean_padded (`bool`): writes into a stream that a LayerNorm reads; see [`cbd_hf.transforms.width.resize`].
        width_power (`float`): the architecture scales what this parameter gives by hidden ** width_power itself.
        pad_power (`float`): a power of d/D for padding alone; copies leave the statistics of norms as they are.
    """

    axes: tuple[Axis, ...]
    group: Group
    norm: Norm | None = None
    norm_gain: bool = False
    block_output: bool = False
    feeds_norm: bool = False
    mean_padded: bool = False
    width_power: float = 0.0
    pad_power: float = 0.0

    @property
    def writes_stream(self) -> bool:
        """Whether its output lands in the residual stream."""
        return any(axis.roles == ("hidden",) and axis.side == "out" for axis in self.axes)

    @property
    def free(self) -> bool:
        """
        Whether its entries at coordinates that an anchor lacks may hold any value without changing the expanded
        anchor's function: they only meet zeros (reads of the stream there, or units that feed into zero entries).
        """
        if self.norm is not None:
            return self.norm_gain and self.norm.role == "hidden" and not self.norm.writes_stream
        if self.writes_stream or self.feeds_norm or any(axis.side == "none" for axis in self._varying):
            return False
        return all(axis.side == "out" or axis.roles == ("hidden",) for axis in self._varying)

    @property
    def _varying(self) -> list[Axis]:
        return [axis for axis in self.axes if not axis.is_fixed]


__all__ = ["GROUPS", "HEAD_ROLES", "Axis", "Group", "Norm", "Segment", "Side", "TensorSpec"]
