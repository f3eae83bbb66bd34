"""Depth: which layer of an anchor stands in which layer of the target, and which of two anchors' layers meet."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerMap:
    """
    Where each target layer comes from in one anchor.

    Args:
        sources (`tuple[int, ...]`): for each target layer, the anchor's layer to read.
        inserted (`tuple[bool, ...]`): for each target layer, whether the anchor has no layer there, so that
            `sources` names its neighbour.
    """

    sources: tuple[int, ...]
    inserted: tuple[bool, ...]


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` distinct indices out of `range(total)`, evenly spaced and including both ends (one: the first)."""
    if not 1 <= count <= total:
        raise ValueError(f"Cannot choose {count} of {total} layers: choose between 1 and {total}.")
    if count == 1:
        return (0,)
    return tuple(round(index * (total - 1) / (count - 1)) for index in range(count))


def identity(have: int, want: int) -> LayerMap:
    """Expansion: the anchor's layers evenly spread, and blocks that change nothing (see [`Trans`]) after them."""
    kept = spread(have, want)
    sources, last = [], 0
    for layer in range(want):
        last = kept.index(layer) if layer in kept else last
        sources.append(last)
    return LayerMap(tuple(sources), tuple(layer not in kept for layer in range(want)))


def interleave(have: int, want: int) -> LayerMap:
    """Expansion by copies beside their original: 0 0 1 1 2 2, layer i from floor(i x have / want)."""
    return LayerMap(tuple(layer * have // want for layer in range(want)), (False,) * want)


def stack(have: int, want: int) -> LayerMap:
    """Expansion by stacking the whole (Gong et al. 2019): 0 1 2 0 1 2, layer i from i mod have."""
    return LayerMap(tuple(layer % have for layer in range(want)), (False,) * want)


def stride(have: int, want: int) -> LayerMap:
    """Subset of evenly spaced layers, the first and the last among them."""
    return LayerMap(spread(want, have), (False,) * want)


def first(have: int, want: int) -> LayerMap:
    """Subset of the first layers (weight selection, arXiv 2311.18823)."""
    return LayerMap(tuple(range(want)), (False,) * want)


def without_middle(have: int, want: int) -> LayerMap:
    """Subset without middle layers, which act nearest to the identity (weight subcloning, arXiv 2312.09299)."""
    front = (want + 1) // 2
    return LayerMap((*range(front), *range(have - (want - front), have)), (False,) * want)


def without(removed: Sequence[int]) -> Callable[[int, int], LayerMap]:
    """Subset by importance: without the first of `removed`, layers in the order of their removal."""

    def subset(have: int, want: int) -> LayerMap:
        gone = set(removed[: have - want])
        if len(gone) != have - want:
            raise ValueError(f"Cannot go from {have} to {want} layers: only {len(removed)} may be removed.")
        return LayerMap(tuple(layer for layer in range(have) if layer not in gone), (False,) * want)

    return subset


EXPANSION_MAPS: Mapping[str, Callable[[int, int], LayerMap]] = {
    "identity": identity,
    "interleave": interleave,
    "stack": stack,
}
SUBSET_MAPS: Mapping[str, Callable[[int, int], LayerMap]] = {
    "first": first,
    "stride": stride,
    "without_middle": without_middle,
}
"""Rules for one anchor alone, by name: (layers it has, layers wanted) -> where each comes from."""


def match_kinds(few: Sequence[Hashable], many: Sequence[Hashable]) -> tuple[int, ...]:
    """
    For each of `few` layers a layer of `many` of its kind, in order and as near as possible to its relative depth.

    Raises:
        ValueError: there is none.
    """
    scale = (len(many) - 1) / max(1, len(few) - 1)
    infinite = float("inf")
    # cost[j]: least distance of the first i layers placed, the last of them at j; chosen remembers from where.
    cost = [abs(j) if kind == few[0] else infinite for j, kind in enumerate(many)]
    steps: list[list[int]] = []
    for i, wanted in enumerate(few[1:], start=1):
        best, best_at, previous, came = infinite, -1, cost, []
        cost = []
        for j, kind in enumerate(many):
            came.append(best_at)
            cost.append(best + abs(j - i * scale) if kind == wanted else infinite)
            if previous[j] < best:
                best, best_at = previous[j], j
        steps.append(came)
    last = min(range(len(many)), key=cost.__getitem__)
    if cost[last] == infinite:
        raise ValueError(
            f"The {len(few)} layers of kinds {_runs(few)} do not fit, in order, among {len(many)} of kinds "
            f"{_runs(many)}: choose anchors or a config whose kinds of layers follow one pattern."
        )
    found = [last]
    for came in reversed(steps):
        found.append(came[found[-1]])
    return tuple(reversed(found))


def _runs(kinds: Sequence[Hashable]) -> str:
    names = list(dict.fromkeys(kinds))
    return " ".join(str(names.index(kind)) for kind in kinds)


def align_kinds(
    small: Sequence[Hashable], large: Sequence[Hashable], target: Sequence[Hashable]
) -> tuple[LayerMap, LayerMap]:
    """
    [`align_layers`] for layers of several kinds: only layers of one kind meet.

    Args:
        small (`Sequence`): kind of each layer of the smaller anchor.
        large (`Sequence`): of the larger anchor.
        target (`Sequence`): of the target.

    Raises:
        ValueError: they do not fit into each other.
    """
    if len(small) > len(large):
        large_map, small_map = align_kinds(large, small, target)
        return small_map, large_map
    used, kept = match_kinds(target, large), match_kinds(small, target)
    sources, inserted = [], []
    for layer, kind in enumerate(target):
        inserted.append(layer not in kept)
        # An inserted layer is filled by the larger anchor; the nearest of its kind says how it is laid out.
        near = [index for index, known in enumerate(small) if known == kind]
        if not near:
            raise ValueError(f"The shallower anchor has no layer of the kind of the target's layer {layer}.")
        sources.append(kept.index(layer) if layer in kept else min(near, key=lambda index: abs(kept[index] - layer)))
    return LayerMap(tuple(sources), tuple(inserted)), LayerMap(used, (False,) * len(target))


def align_layers(
    n_small: int, n_large: int, n_target: int, kept: Sequence[int] | None = None, order: Sequence[int] | None = None
) -> tuple[LayerMap, LayerMap]:
    """
    Lay the layers of two anchors onto a target between them, so that the two layers that are blended correspond.

    The deeper anchor gives every target layer one of its own. Layers that correspond to a layer of the shallower
    anchor all stay; of the others as many as fit, so the shallower anchor has a gap at each of those.

    Args:
        n_small (`int`): layers of the smaller anchor.
        n_large (`int`): layers of the larger anchor.
        n_target (`int`): layers of the target, between the two.
        kept (`Sequence[int]`, *optional*): the deeper anchor's layers that the shallower one was cut from, increasing.
            Without it the same relative depth is taken (DESIGN: "Same relative depth").
        order (`Sequence[int]`, *optional*): the deeper anchor's other layers, least important first; the target takes
            its extra layers from the end. Without it they are spread evenly.

    Returns:
        `tuple[LayerMap, LayerMap]`: of the smaller and of the larger anchor.

    Raises:
        ValueError: `n_target` is not between the two, or `kept` does not fit them.
    """
    if n_small > n_large:
        large_map, small_map = align_layers(n_large, n_small, n_target, kept, order)
        return small_map, large_map
    if not n_small <= n_target <= n_large:
        raise ValueError(
            f"The target's {n_target} layers must lie between the anchors' {n_small} and {n_large}: change the "
            "target's config."
        )
    kept = tuple(kept) if kept is not None else spread(n_small, n_large)
    if len(kept) != n_small or sorted(set(kept)) != list(kept) or kept[-1] >= n_large or kept[0] < 0:
        raise ValueError(f"The {len(kept)} kept layers {list(kept)} do not map {n_small} layers into {n_large}.")
    others = [layer for layer in range(n_large) if layer not in kept]
    extra = n_target - n_small
    if order is None:
        chosen = [others[index] for index in spread(extra, len(others))] if extra else []
    else:
        if sorted(order) != others:
            raise ValueError(f"The order {list(order)} must list the layers that were not kept, {others}.")
        chosen = list(order[len(order) - extra :])
    used = sorted([*kept, *chosen])
    position = {layer: index for index, layer in enumerate(kept)}
    small_sources, inserted, last = [], [], 0
    for layer in used:
        inserted.append(layer not in position)
        last = position.get(layer, last)
        small_sources.append(last)
    return (
        LayerMap(tuple(small_sources), tuple(inserted)),
        LayerMap(tuple(used), (False,) * n_target),
    )


__all__ = [
    "EXPANSION_MAPS",
    "SUBSET_MAPS",
    "LayerMap",
    "align_kinds",
    "align_layers",
    "match_kinds",
    "spread",
    "without",
]
