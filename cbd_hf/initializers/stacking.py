"""One anchor's layers by a rule of depth: stacked, interleaved, or every so-manieth."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest

from cbd_hf.initializers.base import Blueprint, TensorSource
from cbd_hf.initializers.single import expand
from cbd_hf.layout import layer_kinds
from cbd_hf.transforms import LayerMap, Stride, Trans
from cbd_hf.transforms.depth import EXPANSION_MAPS, SUBSET_MAPS


def stack(blueprint: Blueprint) -> TensorSource:
    """
    The smaller anchor's layers stacked whole, 0 1 2 0 1 2: layer i from `i mod L` (Gong et al. 2019, "Efficient
    Training of BERT by Progressively Stacking"; the depth rule of StackBERT and bert2BERT, arXiv 2110.07143).

    The width is padded as [`expand`] does, so at the anchor's own depth the function is kept, and with any further
    layer it is not.

    Raises:
        ValueError: the target has fewer layers than the smaller anchor; a layer would come from one of another kind.
    """
    return _deeper(blueprint, "stack")


def interleave(blueprint: Blueprint) -> TensorSource:
    """
    The smaller anchor's layers, each followed by its copies, 0 0 1 1 2 2: layer i from `floor(i * L / L_target)`
    (the interpolation of Chang et al. 2018, arXiv 1710.10348; `interlace` in LiGO's code). Otherwise like [`stack`].

    Raises:
        ValueError: see [`stack`].
    """
    return _deeper(blueprint, "interleave")


def stride(blueprint: Blueprint) -> TensorSource:
    """
    The larger anchor's evenly spaced layers, and in these evenly spaced channels, whole heads and FFN units: the
    structured counterpart of [`weight_selection`], which cuts through heads. Norms' gains are corrected for the
    smaller width, as in [`cut`].

    Raises:
        ValueError: the target has more layers than the larger anchor; a layer would come from one of another kind.
    """
    layers = fewer_layers(blueprint, "stride", SUBSET_MAPS["stride"])
    large = replace(blueprint.large, layers=layers, selection=Stride())
    return TensorSource(lambda name, rows: large.tensor(name, rows=rows), large.splits_by_rows, (large,))


def _deeper(blueprint: Blueprint, name: str) -> TensorSource:
    small = blueprint.small
    have, want = small.source.layers, small.target.layers
    if want < have:
        raise ValueError(
            f"initializer={name!r} repeats the smaller anchor's {have} layers, but the target has only {want}: choose "
            "a config with at least as many, or an initializer that drops layers, such as 'cut'."
        )
    layers = EXPANSION_MAPS[name](have, want)
    check_kinds(blueprint, name, small, layers)
    return expand(replace(blueprint, small=replace(small, layers=layers)))


def fewer_layers(blueprint: Blueprint, name: str, rule: Callable[[int, int], LayerMap]) -> LayerMap:
    """
    The larger anchor's layers that a rule of subset keeps.

    Args:
        blueprint (`Blueprint`): of the target.
        name (`str`): the initialiser's, for messages.
        rule (`Callable[[int, int], LayerMap]`): see [`cbd_hf.transforms.depth.SUBSET_MAPS`].

    Raises:
        ValueError: the target has more layers than the larger anchor; a layer would come from one of another kind.
    """
    have, want = blueprint.large.source.layers, blueprint.large.target.layers
    if want > have:
        raise ValueError(
            f"initializer={name!r} keeps some of the larger anchor's {have} layers, but the target has {want}: choose "
            "a config with at most as many, or an initializer that adds layers, such as 'expand'."
        )
    layers = rule(have, want)
    check_kinds(blueprint, name, blueprint.large, layers)
    return layers


def check_kinds(
    blueprint: Blueprint, name: str, trans: Trans, layers: LayerMap, only: Iterable[int] | None = None
) -> None:
    """
    Find out, before anything is read, that the layers of an anchor are of the kind of those they come to stand for.

    Args:
        blueprint (`Blueprint`): of the target.
        name (`str`): the initialiser's, for messages.
        trans (`Trans`): reads the anchor.
        layers (`LayerMap`): which of the anchor's layers stand where.
        only (`Iterable[int]`, *optional*): the target's layers to look at; by default all.

    Raises:
        ValueError: a layer is of another kind (sliding instead of full attention, dense instead of experts).
    """
    have = _kinds_of(blueprint, trans)
    if have is None:  # then Trans.check still compares the parameters' names and shapes
        return
    want = layer_kinds(blueprint.config, blueprint.family)
    for layer in range(len(want)) if only is None else only:
        source = layers.sources[layer]
        differing = [pair for pair in zip_longest(have[source], want[layer], fillvalue="-") if pair[0] != pair[1]]
        if differing:
            raise ValueError(
                f"initializer={name!r} puts layer {source} of the anchor in place of the target's layer {layer}, but "
                f"they are of different kinds ({differing[0][0]}, {differing[0][1]}): choose a config whose kinds of "
                "layers fit, or an initializer that matches them, such as 'chain', 'cut' or 'expand'."
            )


def _kinds_of(blueprint: Blueprint, trans: Trans) -> Sequence[Sequence[Hashable]] | None:
    """Kind of each of an anchor's layers, from its config; `None` for weights in memory, which have none."""
    from transformers import AutoConfig

    directory = getattr(trans.reader, "directory", None)
    if directory is None:
        return None
    return layer_kinds(AutoConfig.from_pretrained(directory, trust_remote_code=False), blueprint.family)


__all__ = ["check_kinds", "fewer_layers", "interleave", "stack", "stride"]
