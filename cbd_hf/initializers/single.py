"""Single-anchor starts, the rivals that every chain target is compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cbd_hf.initializers.base import Blueprint, Rows, TensorSource


if TYPE_CHECKING:
    import torch


def expand(blueprint: Blueprint) -> TensorSource:
    """
    The smaller anchor alone, expanded (alpha = 1): the same function as before where Trans is exact.

    New coordinates that cannot change the function start from noise of the config's `initializer_range`, since a unit
    with zeros on both sides would never learn.
    """
    import torch

    std = getattr(blueprint.config, "initializer_range", 0.02)
    small = blueprint.small
    # What leads up to the output projections is, in an inserted layer too, the neighbour's and not noise alone.
    copies = replace(small, expansion="replicate")
    wider = replace(small.source, layers=0) != replace(small.target, layers=0)

    def make(name: str, rows: Rows | None) -> torch.Tensor:
        spec = blueprint.family.spec(name)
        shape = blueprint.target_shape(name)
        if not (wider and len(shape) > 1 and spec.free):
            return small.tensor(name, rows=rows)
        fill = torch.randn(shape, generator=blueprint.generator(name)).mul_(std)
        return copies.tensor(name, fill=fill)

    def splits(name: str) -> bool:
        spec = blueprint.family.spec(name)
        noisy = wider and len(spec.axes) > 1 and spec.free
        return not noisy and small.splits_by_rows(name)

    return TensorSource(make, splits, (small,))


def cut(blueprint: Blueprint) -> TensorSource:
    """The larger anchor alone, cut to the target's shape (alpha = 0)."""
    large = blueprint.large
    return TensorSource(lambda name, rows: large.tensor(name, rows=rows), large.splits_by_rows, (large,))


__all__ = ["cut", "expand"]
