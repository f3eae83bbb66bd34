"""Orthogonal matching pursuit for many vectors at once."""

from __future__ import annotations

import torch


_EXACT = 1e-5  # of a vector's norm; float32 cannot tell a smaller residual from rounding
_DEPENDENT = 1e-4  # of an atom's norm; what is left of it beside the atoms already chosen


@torch.no_grad()
def matching_pursuit(
    targets: torch.Tensor, atoms: torch.Tensor, k: int, *, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Approximate every target by at most `k` atoms: `targets[i] ~ coefficients[i] @ atoms[chosen[i]]`.

    Each step takes the atom of largest cosine to the residual and fits all atoms taken so far by least squares. A
    target that is reached exactly takes no more.

    Args:
        targets (`torch.Tensor`): floating point, shape (targets, width).
        atoms (`torch.Tensor`): the same dtype and device, shape (atoms, width). Atoms of zeros are never of use.
        k (`int`): in [1, min(atoms, width)].
        batch_size (`int`, *optional*, defaults to 256): targets at a time; each takes memory for `atoms` numbers and
            `k x width` numbers.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `chosen`, int64, and `coefficients`, in the targets' dtype, both of shape
        (targets, k). Where fewer atoms are needed the coefficient is 0.

    Raises:
        ValueError: `k` is out of its range.
    """
    most = min(atoms.shape)
    if not 1 <= k <= most:
        raise ValueError(
            f"k must be in [1, {most}], with {atoms.shape[0]} vectors of width {atoms.shape[1]} to combine; got {k}."
        )
    norms = atoms.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1)
    directions = atoms / norms[:, None]
    parts = [_pursue(part, directions, k) for part in targets.split(batch_size)]
    if not parts:
        return targets.new_zeros(0, k, dtype=torch.long), targets.new_zeros(0, k)
    chosen = torch.cat([part[0] for part in parts])
    return chosen, torch.cat([part[1] for part in parts]) / norms[chosen]


def _pursue(targets: torch.Tensor, directions: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`matching_pursuit`], with atoms of norm 1; the chosen ones are kept as a QR decomposition."""
    count, width = targets.shape
    basis = targets.new_zeros(count, k, width)
    triangle = torch.eye(k, dtype=targets.dtype, device=targets.device).repeat(count, 1, 1)
    along = targets.new_zeros(count, k)
    chosen = torch.zeros(count, k, dtype=torch.long, device=targets.device)
    residual = targets.clone()
    enough = _EXACT * targets.norm(dim=1)
    for step in range(k):
        scores = (residual @ directions.T).abs_().scatter_(1, chosen[:, :step], -1)
        chosen[:, step] = scores.argmax(dim=1)
        rest, overlap = directions[chosen[:, step]], targets.new_zeros(count, step)
        for _ in range(2):  # once is not orthogonal enough in float32
            share = torch.bmm(basis[:, :step], rest[:, :, None])
            rest = rest - torch.bmm(share.transpose(1, 2), basis[:, :step])[:, 0]
            overlap = overlap + share[:, :, 0]
        height = rest.norm(dim=1)
        useful = (residual.norm(dim=1) > enough) & (height > _DEPENDENT)
        if not bool(useful.any()):
            break
        basis[:, step] = torch.where(useful[:, None], rest / height[:, None], 0)
        triangle[:, :step, step] = torch.where(useful[:, None], overlap, 0)
        triangle[:, step, step] = torch.where(useful, height, 1)
        along[:, step] = (basis[:, step] * residual).sum(dim=1)
        residual -= along[:, step, None] * basis[:, step]
    return chosen, torch.linalg.solve_triangular(triangle, along[:, :, None], upper=True)[:, :, 0]


__all__ = ["matching_pursuit"]
