"""Which coordinates a subset keeps: one small rule for each name, for channels, heads and FFN units alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol


if TYPE_CHECKING:
    from cbd_hf.transforms.importance import Importance


class Selection(Protocol):
    """
    A rule of subset.

    Attributes:
        by_layer (`bool`): whether it keeps different parts in different layers.
        raw (`bool`): whether it takes tensors as mere arrays: single entries instead of whole heads, and norms' gains
            without a correction for the width.
    """

    by_layer: bool
    raw: bool

    def keep(self, role: str, layer: int | None, have: int, want: int) -> Sequence[int]:
        """
        The `want` of `have` parts that stay, increasing.

        Args:
            role (`str`): `"hidden"` (channels of the residual stream, the same in every tensor), `"kv_heads"` (whole
                heads with their query heads), `"group"` (query heads of one key/value head), `"ffn"` or `"ffn:..."`;
                a raw rule is asked for the entries of `"query"`, `"key_value"` and `"group"` instead of heads.
            layer (`int`, *optional*): the anchor's layer; `None` for the stream.
            have (`int`): parts the anchor has.
            want (`int`): parts to keep, at most `have`.
        """
        ...


class First:
    """The first ones: the important ones in an anchor that was sorted, and the only prefix that nests."""

    by_layer = False
    raw = False

    def keep(self, role: str, layer: int | None, have: int, want: int) -> Sequence[int]:
        """See [`Selection.keep`]."""
        return range(want)


class Stride:
    """
    Evenly spaced ones, whole heads and units: every have/want-th where that is whole, else the rounded points of a
    line from the first to the last.
    """

    by_layer = False
    raw = False

    def keep(self, role: str, layer: int | None, have: int, want: int) -> Sequence[int]:
        """See [`Selection.keep`]."""
        if have % want == 0:
            return range(0, have, have // want)
        if want == 1:
            return [0]
        return [round(index * (have - 1) / (want - 1)) for index in range(want)]


class EvenEntries(Stride):
    """Evenly spaced entries of every tensor (weight selection, arXiv 2311.18823), which cuts through heads."""

    raw = True


@dataclass(frozen=True)
class MostImportant:
    """
    Those with the largest scores on calibration text; the same channels of the stream everywhere.

    Args:
        importance (`Importance`): of the anchor; see [`measure_importance`].
    """

    importance: Importance
    by_layer = True
    raw = False

    def keep(self, role: str, layer: int | None, have: int, want: int) -> Sequence[int]:
        """See [`Selection.keep`]."""
        scores = self._scores(role, layer)
        if scores is None or want == have:
            return range(want)
        if len(scores) != have:
            raise ValueError(f"The importance of {role} was measured for {len(scores)} parts, but there are {have}.")
        return sorted(scores.argsort(descending=True)[:want].tolist())

    def _scores(self, role: str, layer: int | None):  # type: ignore[no-untyped-def]  # torch is imported lazily
        if role == "hidden":
            return self.importance.hidden
        per_layer = {"kv_heads": self.importance.kv_heads, "ffn": self.importance.ffn}.get(role)
        # Query heads within a group, and experts' units, are not scored: their first ones stay.
        return per_layer[layer] if per_layer is not None and layer is not None and layer < len(per_layer) else None


SELECTIONS: Mapping[str, type] = {"first": First, "stride": Stride, "importance": MostImportant}

__all__ = ["SELECTIONS", "EvenEntries", "First", "MostImportant", "Selection", "Stride"]
