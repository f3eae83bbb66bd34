"""From a number of parameters to a config: the lattice of shapes between two anchors (docs/method.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from cbd_hf.families import check_same_family, get_family
from cbd_hf.layout import Family, Shape, config_with_shape, count_parameters, layer_kinds, meta_model, shape_of
from cbd_hf.transforms.depth import LayerMap, align_kinds, align_layers, match_kinds


if TYPE_CHECKING:
    from transformers import PretrainedConfig


_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


def format_size(n_params: float) -> str:
    """A parameter count for people: `138.6M`, `1.72B`, `292.8k`."""
    for limit, unit, digits in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if n_params >= limit:
            return f"{n_params / limit:.{digits}f}{unit}"
    return f"{n_params:.0f}"


def parse_size(text: str) -> float:
    """
    A number of parameters: `138e6`, `138_000_000`, `138M`, `1.7B`, `250k`.

    Raises:
        ValueError: it is not a number.
    """
    number, unit = text.strip(), 1.0
    if number[-1:].upper() in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1].upper()]
    try:
        return float(number) * unit
    except ValueError:
        raise ValueError(f"n_params={text!r} is not a number of parameters; write 138e6 or 138M.") from None


def size_name(n_params: float) -> str:
    """The folder's name for a wanted size: `138M`, `1.7B`, `292.8k`."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n_params >= factor:
            return f"{n_params / factor:.6g}{unit}"
    return f"{n_params:g}"


def check_n_params(n_params: float, smallest: int, largest: int) -> None:
    """Raise a `ValueError` that names the range unless `smallest <= n_params <= largest`."""
    if isinstance(n_params, bool) or not isinstance(n_params, Real) or not math.isfinite(n_params):
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


def recorded_cut(cut: Mapping[str, Any] | None, larger: str) -> tuple[list[int] | None, list[int] | None]:
    """
    (kept layers, removal order) that an anchor's record says of its cut out of the larger neighbour; `None` for each
    where it was not cut out of that one.
    """
    if not cut or cut.get("from") != larger:
        return None, None
    return cut["layers"], cut.get("removed")


def corresponding_layers(
    small: PretrainedConfig,
    large: PretrainedConfig,
    target: PretrainedConfig | int,
    family: Family,
    kept: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
) -> tuple[LayerMap, LayerMap]:
    """
    Which layers of two anchors meet in each layer of a target; see [`align_layers`] and, for layers of several kinds
    (sliding and full attention, dense and experts), [`align_kinds`].

    Args:
        small (`PretrainedConfig`): of the smaller anchor.
        large (`PretrainedConfig`): of the larger anchor.
        target (`PretrainedConfig` or `int`): the target's config, or its number of layers.
        family (`Family`): their layout.
        kept (`Sequence[int]`, *optional*): the deeper anchor's layers that the shallower one was cut from.
        order (`Sequence[int]`, *optional*): the deeper anchor's other layers in the order of their removal.

    Raises:
        ValueError: the depths or the kinds do not fit.
    """
    n_target = target if isinstance(target, int) else shape_of(target, family).layers
    kinds = [layer_kinds(config, family) for config in (small, large)]
    n_small, n_large = map(len, kinds)
    if not isinstance(target, int) and len({*kinds[0], *kinds[1]}) > 1 and kept is None:
        if not min(n_small, n_large) <= n_target <= max(n_small, n_large):
            align_layers(n_small, n_large, n_target)  # says so
        return align_kinds(kinds[0], kinds[1], layer_kinds(target, family))
    shallow, deep = sorted(kinds, key=len)
    if kept is None and len({*shallow, *deep}) > 1:
        kept = match_kinds(shallow, deep)
    maps = align_layers(n_small, n_large, n_target, kept, order)
    wanted = None if isinstance(target, int) else layer_kinds(target, family)
    for layer in range(n_target):
        met = [of[map_.sources[layer]] for map_, of in zip(maps, kinds, strict=True) if not map_.inserted[layer]]
        if len(set(met)) > 1 or wanted is not None and set(met) - {wanted[layer]}:
            raise ValueError(
                f"In the target's layer {layer} layers of different kinds would meet ({maps[0].sources[layer]} and "
                f"{maps[1].sources[layer]} of the anchors): choose anchors, or a config, whose kinds of layers "
                "correspond."
            )
    return maps


def plan_config(
    small: PretrainedConfig,
    large: PretrainedConfig,
    n_params: float,
    kept: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
) -> PretrainedConfig:
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
        kept (`Sequence[int]`, *optional*): see [`corresponding_layers`].
        order (`Sequence[int]`, *optional*): likewise.

    Returns:
        `PretrainedConfig`: of the anchors' class; one of the anchors' own configs if the size is exactly theirs.

    Raises:
        ValueError: the anchors are not of one family, or `n_params` is outside their range.
    """
    family = check_same_family(small, large)
    counter = _Counter(small, large, family, kept, order)
    (n_small, _, small), (n_large, _, large) = sorted(
        (counter.count(config), index, config) for index, config in enumerate((small, large))
    )
    check_n_params(n_params, n_small, n_large)
    if n_params == n_large:
        return config_with_shape(large, shape_of(large, family), family)
    candidates = lattice(small, large, family, kept, order)
    # Nearest count; between equals the wider one, since depth is cheaper to distil back than width.
    _, _, shape = min(
        ((abs(count - n_params), -shape.hidden, shape) for shape, count in candidates), key=lambda item: item[:2]
    )
    return lattice_config(small, large, shape, family, kept, order)


def neighbouring_sizes(
    small: PretrainedConfig,
    large: PretrainedConfig,
    n_params: float,
    kept: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
) -> tuple[int, int]:
    """The largest possible size up to `n_params` and the smallest from it on; see [`plan_config`]."""
    counts = [count for _, count in lattice(small, large, check_same_family(small, large), kept, order)]
    # At an end of the lattice both are that end.
    below = max((count for count in counts if count <= n_params), default=min(counts))
    return below, min((count for count in counts if count >= n_params), default=max(counts))


def lattice_config(
    small: PretrainedConfig,
    large: PretrainedConfig,
    shape: Shape,
    family: Family,
    kept: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
) -> PretrainedConfig:
    """The config of one shape of [`lattice`]; its layers are of the kinds that meet in them."""
    if not _is_mixed(small, large, family):
        return config_with_shape(small, shape, family)
    maps = corresponding_layers(small, large, shape.layers, family, kept, order)
    deep, layers = _deeper(small, large, maps, family)
    return config_with_shape(deep, shape, family, layers=layers.sources)


def _is_mixed(small: PretrainedConfig, large: PretrainedConfig, family: Family) -> bool:
    return len({*layer_kinds(small, family), *layer_kinds(large, family)}) > 1


def _deeper(
    small: PretrainedConfig, large: PretrainedConfig, maps: tuple[LayerMap, LayerMap], family: Family
) -> tuple[PretrainedConfig, LayerMap]:
    if shape_of(small, family).layers > shape_of(large, family).layers:
        return small, maps[0]
    return large, maps[1]


def plan_cut(config: PretrainedConfig, n_params: float) -> PretrainedConfig:
    """
    The config nearest `n_params` that keeps the width of `config` and has fewer layers.

    Raises:
        ValueError: `n_params` is not below the size of `config`, or below that of a single layer at this width.
    """
    family = get_family(config)
    shape = shape_of(config, family)
    if _is_mixed(config, config, family):
        raise ValueError(
            f"This {config.model_type} mixes kinds of layers, so a size does not fix its layers, and its depth cannot "
            "be cut: cut its width, or take a checkpoint."
        )
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


def lattice(
    small: PretrainedConfig,
    large: PretrainedConfig,
    family: Family,
    kept: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
) -> Iterator[tuple[Shape, int]]:
    """
    Every shape between two anchors with its exact number of parameters.

    Widths lie on the straight line between the anchors' in steps of one head, depths between theirs.
    """
    a, b = shape_of(small, family), shape_of(large, family)
    depths = range(min(a.layers, b.layers), max(a.layers, b.layers) + 1)
    counter = _Counter(small, large, family, kept, order)
    for width in _widths(a, b, family):
        try:
            config_with_shape(counter.base, replace(width, layers=counter.layers), family, range(counter.layers))
        except ValueError:
            continue  # a width the architecture itself forbids
        for layers, count in zip(depths, counter.counts(width, depths), strict=True):
            yield replace(width, layers=layers), count


class _Counter:
    """Exact numbers of parameters of every shape, from one model without weights and the meaning of its axes."""

    def __init__(
        self,
        small: PretrainedConfig,
        large: PretrainedConfig,
        family: Family,
        kept: Sequence[int] | None,
        order: Sequence[int] | None,
    ) -> None:
        self.family = family
        self.base = max((small, large), key=lambda config: shape_of(config, family).layers)
        self.mixed = _is_mixed(small, large, family)
        self.layers = shape_of(self.base, family).layers if self.mixed else 1
        self._used = lambda depth: (
            _deeper(small, large, corresponding_layers(small, large, depth, family, kept, order), family)[1].sources
        )
        shape = replace(shape_of(self.base, family), layers=self.layers)
        model = meta_model(config_with_shape(self.base, shape, family, range(self.layers)))
        self._parameters = [
            (family.split(name)[0], family.spec(name).axes, tuple(parameter.shape))
            for name, parameter in model.named_parameters()
        ]

    def count(self, config: PretrainedConfig) -> int:
        """Parameters of one of the anchors."""
        if self.mixed:
            return count_parameters(config)
        shape = shape_of(config, self.family)
        return self.counts(shape, range(shape.layers, shape.layers + 1))[0]

    def counts(self, width: Shape, depths: range) -> list[int]:
        """Parameters at one width and every depth."""
        rest, of_layer = 0, [0] * self.layers
        for layer, axes, lengths in self._parameters:
            size = math.prod(
                length if axis.is_fixed else width.length(axis) for axis, length in zip(axes, lengths, strict=True)
            )
            if layer is None:
                rest += size
            else:
                of_layer[layer] += size
        if not self.mixed:
            return [rest + of_layer[0] * depth for depth in depths]
        return [rest + sum(of_layer[source] for source in self._used(depth)) for depth in depths]


def _widths(a: Shape, b: Shape, family: Family) -> Iterator[Shape]:
    """Shapes on the straight line from `a`'s width to `b`'s, in steps of one head, where heads come out whole."""
    if a.hidden != b.hidden:
        # One head wide; where the anchors' distance is no multiple of that, one channel per head (transformers wants
        # the hidden size to be a multiple of the heads).
        difference = abs(b.hidden - a.hidden)
        steps = difference / next(step for step in (a.head_dim, a.heads, 1) if difference % step == 0)
    elif a.heads != b.heads:
        steps = abs(b.heads - a.heads)
    else:
        units = max(abs(b.widths[name] - a.widths[name]) for name in a.widths)
        steps = max(1, units // a.head_dim)
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
        if family.heads_fill_hidden and round(heads) * a.head_dim != round(hidden):
            continue
        yield replace(
            a,
            hidden=round(hidden),
            heads=round(heads),
            kv_heads=round(kv_heads),
            ffn=round(between(a.ffn, b.ffn)),
            extra=tuple((name, round(between(count, dict(b.extra)[name]))) for name, count in a.extra),
        )


__all__ = [
    "check_n_params",
    "corresponding_layers",
    "default_alpha",
    "format_size",
    "lattice",
    "lattice_config",
    "neighbouring_sizes",
    "parse_size",
    "plan_config",
    "plan_cut",
    "recorded_cut",
    "size_name",
]
