"""From a number of parameters to a config: the lattice of shapes between two anchors (DESIGN: "Shape for a size")."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cbd_hf.layout import (
    Family,
    Shape,
    check_same_family,
    config_with_shape,
    count_parameters,
    get_family,
    shape_of,
)


if TYPE_CHECKING:
    from transformers import PretrainedConfig


def format_size(n_params: float) -> str:
    """A parameter count for people: `138.6M`, `1.72B`, `292.8k`."""
    for limit, unit, digits in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if n_params >= limit:
            return f"{n_params / limit:.{digits}f}{unit}"
    return f"{n_params:.0f}"


def check_n_params(n_params: float, smallest: int, largest: int) -> None:
    """Raise a `ValueError` that names the range unless `smallest <= n_params <= largest`."""
    if isinstance(n_params, bool) or not isinstance(n_params, int | float) or not math.isfinite(n_params):
        raise ValueError(f"n_params must be a finite number of parameters such as 138e6, got {n_params!r}.")
    if not smallest <= n_params <= largest:
        raise ValueError(
            f"n_params={n_params:,.0f} is outside the chain's range, {smallest:,} ({format_size(smallest)}) to "
            f"{largest:,} ({format_size(largest)}). Choose a size in between, or build a chain that spans it."
        )


def default_alpha(n_small: int, n_large: int, n_target: int) -> float:
    """
    Weight of the smaller anchor by relative size: `(n_large - n_target) / (n_large - n_small)`.

    0.94 for the paper's 138M target between GPT-2 B and M, where it finds 0.9 best (Sec. 4.2.2).
    """
    return (n_large - n_target) / (n_large - n_small)


def plan_config(small: PretrainedConfig, large: PretrainedConfig, n_params: float) -> PretrainedConfig:
    """
    The config of the model nearest `n_params` between two anchors.

    Candidates are all (layers, width) with layers between the two anchors' and width between theirs in steps of one
    head; the other dimensions (heads, key/value heads, FFN) follow the family's ratios, and a width at which heads or
    key/value heads would not be whole is left out. Counts are exact (meta device, tied weights once); no weights are
    allocated. Reproduces the paper's Table 8.

    Args:
        small (`PretrainedConfig`): config of the smaller anchor.
        large (`PretrainedConfig`): config of the larger anchor.
        n_params (`float`): wanted number of parameters, such as `138e6`.

    Returns:
        `PretrainedConfig`: of the anchors' class; one of the anchors' own configs if the size is exactly theirs.

    Raises:
        ValueError: the anchors are not of one family, or `n_params` is outside their range.
    """
    family = check_same_family(small, large)
    (n_small, _, small), (n_large, _, large) = sorted(
        (_count(config, family), index, config) for index, config in enumerate((small, large))
    )
    check_n_params(n_params, n_small, n_large)
    if n_params == n_large:
        return config_with_shape(large, shape_of(large, family), family)
    candidates = _lattice(small, large, family)
    # Nearest count; between equals the wider one, since depth is cheaper to distil back than width.
    _, _, shape = min(
        ((abs(count - n_params), -shape.hidden, shape) for shape, count in candidates), key=lambda item: item[:2]
    )
    return config_with_shape(small, shape, family)


def plan_cut(config: PretrainedConfig, n_params: float) -> PretrainedConfig:
    """
    The config nearest `n_params` that keeps the width of `config` and has fewer layers.

    Raises:
        ValueError: `n_params` is not below the size of `config`, or below that of a single layer at this width.
    """
    family = get_family(config)
    shape = shape_of(config, family)
    base, per_layer = _affine_count(config, shape, family)
    largest = base + per_layer * (shape.layers - 1)
    check_n_params(n_params, base + per_layer, largest)
    layers = min(range(1, shape.layers), key=lambda count: abs(base + per_layer * count - n_params))
    return config_with_shape(config, replace(shape, layers=layers), family)


def _affine_count(config: PretrainedConfig, shape: Shape, family: Family) -> tuple[int, int]:
    # Layers are alike, so the count is affine in their number: two tiny meta models give it for every depth.
    one, two = (
        count_parameters(config_with_shape(config, replace(shape, layers=layers), family)) for layers in (1, 2)
    )
    return 2 * one - two, two - one


def _count(config: PretrainedConfig, family: Family) -> int:
    shape = shape_of(config, family)
    base, per_layer = _affine_count(config, shape, family)
    return base + per_layer * shape.layers


def _lattice(small: PretrainedConfig, large: PretrainedConfig, family: Family) -> Iterator[tuple[Shape, int]]:
    a, b = shape_of(small, family), shape_of(large, family)
    for width in _widths(a, b):
        try:
            base, per_layer = _affine_count(small, width, family)
        except ValueError:
            continue  # a width the architecture itself forbids
        for layers in range(min(a.layers, b.layers), max(a.layers, b.layers) + 1):
            yield replace(width, layers=layers), base + per_layer * layers


def _widths(a: Shape, b: Shape) -> Iterator[Shape]:
    """Shapes on the straight line from `a`'s width to `b`'s, in steps of one head, where heads come out whole."""
    if a.hidden != b.hidden:
        # One head wide; where the anchors' distance is no multiple of that, one channel per head (transformers wants
        # the hidden size to be a multiple of the heads).
        difference = abs(b.hidden - a.hidden)
        steps = difference / next(step for step in (a.head_dim, a.heads, 1) if difference % step == 0)
    elif a.heads != b.heads:
        steps = abs(b.heads - a.heads)
    else:
        steps = max(1, abs(b.ffn - a.ffn) // a.head_dim)
    for step in range(math.ceil(steps) + 1):
        t = min(step / steps, 1.0)

        def between(one: int, other: int, t: float = t) -> float:
            return one + t * (other - one)

        hidden, heads, kv_heads = (
            between(one, other) for one, other in ((a.hidden, b.hidden), (a.heads, b.heads), (a.kv_heads, b.kv_heads))
        )
        if any(abs(value - round(value)) > 1e-6 for value in (hidden, heads, kv_heads)):
            continue
        if round(heads) % round(kv_heads):
            continue
        yield replace(
            a,
            hidden=round(hidden),
            heads=round(heads),
            kv_heads=round(kv_heads),
            ffn=round(between(a.ffn, b.ffn)),
        )


__all__ = ["check_n_params", "default_alpha", "format_size", "plan_config", "plan_cut"]
