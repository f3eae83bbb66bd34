"""CBD's initialiser: interpolate the two neighbouring anchors (paper Eq. 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cbd_hf.initializers.base import Blueprint, Rows, TensorSource
from cbd_hf.transforms.width import pads_with_mean


if TYPE_CHECKING:
    import torch


def interpolate(blueprint: Blueprint) -> TensorSource:
    """
    `theta = alpha * Trans(small) + (1 - alpha) * Trans(large)` (Eq. 3), alpha by group of parameters.

    Where the smaller anchor has no layer or coordinate, its zeros scale down what the larger one puts there by
    1 - alpha once, at the output; the weights leading up to it are the larger anchor's own.
    """
    import torch

    small_side, large_side = blueprint.small, blueprint.large

    def make(name: str, rows: Rows | None, out: torch.Tensor | None = None) -> torch.Tensor:
        alpha = blueprint.alpha[blueprint.family.group(name)]
        if out is not None and _blend_in_place(blueprint, name, rows, alpha, out):
            return out
        large = large_side.tensor(name, rows=rows)
        if alpha == 0 or not large.is_floating_point():
            return large
        # `lerp` of equal numbers is that number, so what the smaller anchor lacks stays the larger one's, bit for bit.
        return torch.lerp(large, small_side.tensor(name, fill=large, rows=rows), alpha)

    def splits(name: str) -> bool:
        return small_side.splits_by_rows(name) and large_side.splits_by_rows(name)

    share = blueprint.alpha["norms"]
    return TensorSource(make, splits, (small_side, large_side), (share, 1 - share), in_place=True)


def _blend_in_place(blueprint: Blueprint, name: str, rows: Rows | None, alpha: float, out: torch.Tensor) -> bool:
    """
    The same result without a tensor in between, in the stored dtype (`lerp` computes in float32), where both anchors
    give what they have as it is stored. False, and nothing done, where they do not.
    """
    import torch

    large = blueprint.large.corner(name, rows)
    if large is None or large.shape != out.shape or not out.is_floating_point():
        return False
    small = blueprint.small.corner(name, rows)
    if small is None or small.dtype != out.dtype or large.dtype != out.dtype:
        return False
    if out.device != small.device:
        return False
    if small.shape == out.shape:
        torch.lerp(large, small, alpha, out=out)
        return True
    out.copy_(large)
    if alpha == 0:
        return True
    spec = blueprint.family.spec(name)
    inserted = blueprint.small.expansion == "identity" and blueprint.small.inserted(name)
    kept = out  # what the smaller anchor has, narrowed axis by axis; the rest holds the larger one's alone
    # Means last: over what is zero at another axis' new coordinates, they are zero there as well.
    for dim in sorted(range(out.dim()), key=lambda dim: pads_with_mean(spec, dim)):
        length = small.shape[dim]
        rest = kept.narrow(dim, length, kept.shape[dim] - length)
        kept = kept.narrow(dim, 0, length)
        if not rest.numel():
            continue
        if not inserted and pads_with_mean(spec, dim):
            mean = small.float().mean(dim, keepdim=True)
            rest.copy_(torch.lerp(rest.float(), mean, alpha))
        elif spec.block_output if inserted else not spec.free:
            rest.mul_(1 - alpha)
    kept.lerp_(small, alpha)
    return True


__all__ = ["interpolate"]
