"""Weight selection (arXiv 2311.18823): evenly spaced entries of the larger anchor's first layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from cbd_hf.initializers.base import Blueprint, Rows, TensorSource
from cbd_hf.initializers.learngene import OwnWeights
from cbd_hf.initializers.stacking import fewer_layers
from cbd_hf.transforms import EvenEntries
from cbd_hf.transforms.depth import SUBSET_MAPS


if TYPE_CHECKING:
    import torch


def weight_selection(blueprint: Blueprint) -> TensorSource:
    """
    The larger anchor's first layers, of every axis of every tensor evenly spaced entries: each t/s-th where s divides
    t, else round(linspace(0, t - 1, s)) (arXiv 2311.18823, code OscarXZQ/weight-selection). An output head of its own
    starts at random, as the paper leaves out the classifier.

    This is the published rule to the letter: heads are cut through, norms' gains and epsilon stay as they are,
    embeddings that the architecture scales by the width too. The function is not kept. Of packed tensors, queries,
    keys and values are each selected by themselves, so that the result does not depend on the packing. [`stride`] is
    the same with whole heads and corrected gains.

    Raises:
        ValueError: the target is larger than the anchor in some dimension; a layer would come from one of another
            kind.
    """
    large = blueprint.large
    for name, have in large.source.widths.items():
        want = large.target.widths[name]
        if want > have:
            raise ValueError(
                f"Weight selection only removes, but {name} would go from {have} to {want}. Choose a config with at "
                f"most {have}, or initializer='cut', which takes any size."
            )
    layers = fewer_layers(blueprint, "weight_selection", SUBSET_MAPS["first"])
    selected, own = replace(large, layers=layers, selection=EvenEntries()), OwnWeights(blueprint)

    def make(name: str, rows: Rows | None) -> torch.Tensor:
        return own.tensor(name) if name in own.head else selected.tensor(name, rows=rows)

    def splits(name: str) -> bool:
        return name not in own.head and selected.splits_by_rows(name)

    return _Uncorrected(make, splits, (selected,))


class _Uncorrected(TensorSource):
    """Of an anchor whose gains are not corrected for the width, and so neither is their epsilon."""

    def eps(self, values: Mapping[int, float]) -> float:
        """See [`TensorSource.eps`]."""
        return values[0]


__all__ = ["weight_selection"]
