"""Depth: which layers of the two anchors meet in which layer of the target."""

from __future__ import annotations

from collections.abc import Sequence
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


__all__ = ["LayerMap", "align_layers", "spread"]
