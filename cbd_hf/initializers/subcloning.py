"""The most important part of the larger anchor: as it is, or rescaled (weight subcloning, arXiv 2312.09299)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from cbd_hf.initializers.base import Blueprint, Rows, TensorSource
from cbd_hf.initializers.stacking import fewer_layers
from cbd_hf.layout import Family, TensorSpec
from cbd_hf.transforms import MostImportant
from cbd_hf.transforms.depth import SUBSET_MAPS, without
from cbd_hf.transforms.importance import by_block_influence


if TYPE_CHECKING:
    import torch


def importance(blueprint: Blueprint) -> TensorSource:
    """
    The larger anchor's most important layers (block influence, ShortGPT, arXiv 2403.03853), and in these its most
    important channels, heads and FFN units by their activations (Minitron, arXiv 2407.14679), on calibration text.
    Norms' gains are corrected for the smaller width, as in [`cut`]; the function is not kept.

    Raises:
        ValueError: there is no calibration text; the target has more layers than the larger anchor, or fewer than two
            less; a layer would come from one of another kind.
    """
    if blueprint.importance is None:
        raise ValueError("initializer='importance' scores parts by their activations on text: give calibration.")
    measured = blueprint.importance()
    layers = fewer_layers(blueprint, "importance", without(by_block_influence(measured)))
    large = replace(blueprint.large, layers=layers, selection=MostImportant(measured))
    return TensorSource(lambda name, rows: large.tensor(name, rows=rows), large.splits_by_rows, (large,))


def weight_subcloning(blueprint: Blueprint) -> TensorSource:
    """
    The larger anchor's most important channels, the same in every tensor, without its middle layers, and with weights
    rescaled by sqrt(inputs before / after), so that every linear layer's output keeps its deviation (arXiv
    2312.09299). The function is not kept.

    What reads the stream is rescaled through its norm's gain, which does the same but to the shift of a LayerNorm.
    Channels are ranked by the mean square of their share in the stream on calibration text instead of the mean
    magnitude; whole key/value heads with their query heads and FFN units by what they add to the stream
    ([`measure_importance`]). Query heads within a group, and experts' units, are not ranked: their first ones stay.

    Raises:
        ValueError: there is no calibration text; the target has more layers than the larger anchor; a layer would come
            from one of another kind.
    """
    if blueprint.importance is None:
        raise ValueError(
            "initializer='weight_subcloning' ranks channels by their activations on text: give calibration, some "
            "texts or token ids."
        )
    layers = fewer_layers(blueprint, "weight_subcloning", SUBSET_MAPS["without_middle"])
    family = blueprint.family
    large = replace(blueprint.large, layers=layers, selection=MostImportant(blueprint.importance()))
    source, target = large.source, large.target
    normed = _normalised(family)

    def factor(spec: TensorSpec) -> float:
        result = 1.0
        for axis in spec.axes:
            if axis.side == "in" and not {"hidden", "fixed", *normed} & set(axis.roles):
                result *= math.sqrt(max(1.0, source.length(axis) / target.length(axis)))
        return result

    def make(name: str, rows: Rows | None) -> torch.Tensor:
        value = large.tensor(name, rows=rows)
        scale = factor(family.spec(name))
        return value if scale == 1 else value * scale

    return TensorSource(make, large.splits_by_rows, (large,))


def _normalised(family: Family) -> set[str]:
    """
    Inner dimensions that a norm runs over right before they are read; its gain is rescaled already. A norm of the
    queries comes with one of the keys, and what is read after attention is the values.
    """
    norms = [spec.norm.role for spec in family.tensors.values() if spec.norm is not None and spec.norm_gain]
    return {role for role in norms if norms.count(role) == 1 and not (role == "query" and "key_value" in norms)}


__all__ = ["importance", "weight_subcloning"]
