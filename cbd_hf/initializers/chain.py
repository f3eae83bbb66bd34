"""CBD's initialiser: interpolate the two neighbouring anchors (paper Eq. 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cbd_hf.initializers.base import Blueprint, TensorSource


if TYPE_CHECKING:
    import torch


def interpolate(blueprint: Blueprint) -> TensorSource:
    """
    `theta = alpha * Trans(small) + (1 - alpha) * Trans(large)` (Eq. 3).

    Where the smaller anchor has no layer or coordinate, its zeros scale down what the larger one puts there by
    1 - alpha once, at the output; the weights leading up to it are the larger anchor's own.
    """
    alpha = blueprint.alpha

    def tensor(name: str) -> torch.Tensor:
        large = blueprint.large.tensor(name)
        if alpha == 0:
            return large
        small = blueprint.small.tensor(name, fill=large)  # may be `large` itself, so nothing is changed in place
        return small.mul(alpha).add_(large, alpha=1 - alpha)

    return tensor


__all__ = ["interpolate"]
