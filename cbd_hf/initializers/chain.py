"""CBD's initialiser: interpolate the two neighbouring anchors (paper Eq. 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cbd_hf.initializers.base import Blueprint, Rows, TensorSource
from cbd_hf.layout import TensorSpec
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
    large = blueprint.large.corners(name, rows)
    small = blueprint.small.corners(name, rows) if large is not None else None
    if large is None or small is None or not out.is_floating_point():
        return False
    blocks = []
    for (place, of_large), (_, of_small) in zip(large, small, strict=True):
        part = out[place]
        if of_large.shape != part.shape or not of_large.dtype == of_small.dtype == out.dtype:
            return False
        blocks.append((part, of_large, of_small))
    if out.device != blocks[0][1].device:
        return False
    spec = blueprint.family.spec(name)
    inserted = blueprint.small.expansion == "identity" and blueprint.small.inserted(name)
    for part, of_large, of_small in blocks:
        _blend_block(part, of_large, of_small, alpha, spec, inserted)
    return True


def _blend_block(
    out: torch.Tensor,
    large: torch.Tensor,
    small: torch.Tensor,
    alpha: float,
    spec: TensorSpec,
    inserted: bool,
) -> None:
    """Blend where the smaller anchor has something; around it, axis by axis, what its padding leaves of the larger."""
    import torch

    # Means last: over what is zero at another axis' new coordinates, they are zero there as well.
    for dim in sorted(range(out.dim()), key=lambda dim: pads_with_mean(spec, dim)):
        length = small.shape[dim]
        more = out.shape[dim] - length
        if more:
            rest, of_large = out.narrow(dim, length, more), large.narrow(dim, length, more)
            if not inserted and pads_with_mean(spec, dim):
                mean = small.float().mean(dim, keepdim=True)
                rest.copy_(torch.lerp(of_large.float(), mean, alpha))
            elif spec.block_output if inserted else not spec.free:
                torch.mul(of_large, 1 - alpha, out=rest)
            else:
                rest.copy_(of_large)
        out, large = out.narrow(dim, 0, length), large.narrow(dim, 0, length)
    if out.numel():
        torch.lerp(large, small, alpha, out=out)


__all__ = ["interpolate"]
