"""Which tokens of a distribution are kept: the most likely ones, or some that are drawn from it."""

from __future__ import annotations

import hashlib

import torch


def most_likely(log_probs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The k most likely tokens, and the mass of all others.

    Args:
        log_probs (`torch.Tensor`): float32, shape (positions, vocab), normalised.
        k (`int`): at most `vocab`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: token ids, int64, shape (positions, k), most likely first;
        their log-probabilities; and the logarithm of the others' mass, shape (positions,), -inf if there are none.
        It is summed from the others, since 1 - sum would lose a small one to rounding.
    """
    values, token_ids = log_probs.topk(k, dim=-1)
    return token_ids, values, log_probs.scatter(-1, token_ids, -torch.inf).logsumexp(-1)


def uniforms_of(key: bytes, seed: int, positions: int, n_samples: int) -> torch.Tensor:
    """
    Uniform numbers that depend on a row's content and the seed alone: float64, shape (positions, n_samples), [0, 1).
    """
    digest = hashlib.blake2b(key, digest_size=8, key=str(seed).encode(), person=b"cbd draws").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    return torch.rand(positions, n_samples, dtype=torch.float64, generator=generator)


def drawn(log_probs: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Tokens drawn from a distribution with replacement, each once, with how often it was drawn.

    Drawn by inverting the cumulative distribution, so that a token changes with its uniform number and not with its
    place in a batch. `counts / n` estimates the distribution without bias.

    Args:
        log_probs (`torch.Tensor`): float32, shape (positions, vocab), normalised.
        uniforms (`torch.Tensor`): float64, shape (positions, n), in [0, 1).

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: token ids, int64, shape (positions, n), ascending, then 0;
        their log-probabilities, then 0; and counts, int64, which are 0 behind the last token.
    """
    cumulative = log_probs.double().exp_().cumsum(-1)
    points = uniforms * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, points, right=True).clamp_(max=log_probs.shape[-1] - 1).sort(-1).values
    new = torch.ones_like(tokens, dtype=torch.bool)
    new[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    place = new.cumsum(-1) - 1
    counts = torch.zeros_like(tokens).scatter_add_(-1, place, torch.ones_like(tokens))
    token_ids = torch.zeros_like(tokens).scatter_(-1, place, tokens)  # equal tokens write to one place
    return token_ids, log_probs.gather(-1, token_ids) * (counts > 0), counts


__all__ = ["drawn", "most_likely", "uniforms_of"]
