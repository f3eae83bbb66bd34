"""Orthogonal matching pursuit against what it must recover and against a plain loop."""

from __future__ import annotations

import pytest
import torch

from cbd_hf.tokenization.matching_pursuit import matching_pursuit


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_by_one(target: torch.Tensor, atoms: torch.Tensor, k: int) -> tuple[list[int], torch.Tensor]:
    """The textbook's loop, with a least-squares fit from scratch in every step."""
    directions = atoms / atoms.norm(dim=1, keepdim=True)
    chosen: list[int] = []
    residual = target
    weights = target[:0]
    for _ in range(k):
        chosen.append(int((directions @ residual).abs().argmax()))
        weights = torch.linalg.lstsq(atoms[chosen].T, target[:, None]).solution[:, 0]
        residual = target - weights @ atoms[chosen]
    return chosen, weights


@pytest.mark.parametrize("batch_size", [3, 64])
def test_like_the_plain_loop(batch_size: int) -> None:
    atoms, targets = normal(60, 24) * normal(60, 1, seed=1).exp(), normal(10, 24, seed=2)
    chosen, weights = matching_pursuit(targets, atoms, 6, batch_size=batch_size)
    for row, target in enumerate(targets):
        expected, expected_weights = one_by_one(target, atoms, 6)
        assert chosen[row].tolist() == expected
        torch.testing.assert_close(weights[row], expected_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recovers_a_sparse_combination(dtype: torch.dtype) -> None:
    atoms = torch.linalg.qr(normal(32, 32, dtype=dtype)).Q * 3
    atoms = torch.cat([atoms, torch.zeros(1, 32, dtype=dtype)])
    used = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(row))[:4] for row in range(9)])
    weights = normal(9, 4, seed=3, dtype=dtype) + 2
    targets = torch.einsum("ts,tsw->tw", weights, atoms[used])
    chosen, found = matching_pursuit(targets, atoms, 10)
    dense = torch.zeros(9, 33, dtype=dtype).scatter_add_(1, chosen, found)
    torch.testing.assert_close(dense, torch.zeros(9, 33, dtype=dtype).scatter_add_(1, used, weights))
    assert ((found != 0).sum(dim=1) == 4).all()  # no more than are needed


def test_repeated_atoms_and_zero_targets() -> None:
    atoms = normal(4, 8)[[0, 0, 1, 1, 2, 2, 3, 3]]
    targets = torch.cat([atoms[[0]] + 2 * atoms[[4]], torch.zeros(1, 8, dtype=torch.float64)])
    chosen, weights = matching_pursuit(targets, atoms, 8)
    assert weights.isfinite().all() and not weights[1].any()
    torch.testing.assert_close(torch.einsum("tk,tkw->tw", weights, atoms[chosen]), targets)


def test_nothing_to_approximate() -> None:
    chosen, weights = matching_pursuit(torch.zeros(0, 8), torch.ones(4, 8), 2)
    assert chosen.shape == weights.shape == (0, 2) and chosen.dtype == torch.int64


@pytest.mark.parametrize(("k", "most"), [(0, 4), (5, 4), (9, 4)])
def test_k_out_of_range(k: int, most: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in \[1, {most}\].*got {k}"):
        matching_pursuit(torch.ones(1, 8), torch.ones(4, 8), k)
