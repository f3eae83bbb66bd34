"""Log-probabilities of given tokens, and losses that depend on nothing else, in tiles of positions as in `tiles`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F

from cbd_hf.distillation.predictions import Head
from cbd_hf.distillation.tiles import Gradients, Needs, Outcome, Projection, head_rows, tile_slices, with_gradients


TokenLoss: TypeAlias = Callable[[torch.Tensor, slice], torch.Tensor]


def tiled_token_loss(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    token_loss: TokenLoss,
    temperature: float = 1.0,
    vocab: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A sum over positions of a function of the labels' log-probabilities. The logits of a batch never exist.

    Args:
        hidden (`torch.Tensor`): any float dtype, shape (positions, hidden).
        head ([`Head`]): makes logits of it.
        labels (`torch.Tensor`): int64, shape (positions,), below `vocab`.
        token_loss (`Callable`): gets log-probabilities, float32, and the slice of positions that they belong to;
            returns the loss of each.
        temperature (`float`, *optional*, defaults to 1.0): logits are divided by it.
        vocab (`int`, *optional*): entries of the softmax; by default all.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sum, float32, whose gradient reaches `hidden` and the head's weight
        and bias; and the log-probabilities, float32, shape (positions,), without gradient.
    """

    def work(head: Head, hidden: torch.Tensor, needs: Needs, low: bool) -> Outcome:
        return _over_tiles(head, hidden, labels, token_loss, temperature, vocab, low, needs)

    return with_gradients(hidden, head, work)


@torch.no_grad()
def selected_log_probs(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, temperature: float = 1.0, vocab: int | None = None
) -> torch.Tensor:
    """The labels' log-probabilities, float32, shape (positions,), without gradient; see [`tiled_token_loss`]."""
    return tiled_token_loss(hidden, head, labels, lambda log_probs, rows: log_probs, temperature, vocab)[1]


def _over_tiles(
    head: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    token_loss: TokenLoss,
    temperature: float,
    vocab: int | None,
    low: bool,
    needs: Needs,
) -> Outcome:
    vocab = head_rows(head, hidden) if vocab is None else vocab
    own = Projection(head, vocab, low)
    gradients = Gradients(hidden, head, needs)
    total = hidden.new_zeros((), dtype=torch.float32)
    found = hidden.new_zeros(len(labels), dtype=torch.float32)
    for rows in tile_slices(hidden.shape[0], vocab, hidden.device):
        raw = own.raw(hidden[rows]).requires_grad_(any(needs))
        with torch.set_grad_enabled(any(needs)):
            log_probs = -F.cross_entropy(own.scaled(raw) / temperature, labels[rows], reduction="none")
            value = token_loss(log_probs, rows).sum()
        found[rows] = log_probs.detach()
        total += value.detach()
        if not any(needs):
            continue
        (gradient,) = torch.autograd.grad(value, raw)
        gradients.add(own, rows, gradient)
    return total, found, gradients.found


__all__ = ["TokenLoss", "selected_log_probs", "tiled_token_loss"]
