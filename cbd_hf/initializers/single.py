"""Single-anchor starts, the rivals that every chain target is compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cbd_hf.initializers.base import Blueprint, TensorSource


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
    generator = torch.Generator().manual_seed(blueprint.seed)
    # What leads up to the output projections is, in an inserted layer too, the neighbour's and not noise alone.
    copies = replace(blueprint.small, expansion="replicate")

    def tensor(name: str) -> torch.Tensor:
        spec = blueprint.family.spec(name)
        shape = [sum(blueprint.small.target.size_of(role) for role in axis.roles) for axis in spec.axes]
        lacks_width = blueprint.small.source != blueprint.small.target and len(shape) > 1 and spec.free
        if not lacks_width:
            return blueprint.small.tensor(name)
        return copies.tensor(name, fill=torch.randn(shape, generator=generator).mul_(std))

    return tensor


def cut(blueprint: Blueprint) -> TensorSource:
    """The larger anchor alone, cut to the target's shape (alpha = 0)."""
    return blueprint.large.tensor


__all__ = ["cut", "expand"]
