"""Log-probabilities of given tokens, and losses that depend on nothing else, in tiles of positions as in `tiles`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from cbd_hf.distillation.predictions import Head
from cbd_hf.distillation.tiles import Projection, head_rows, multiplies_in_bfloat16, take_gradients, tile_slices


TokenLoss: TypeAlias = Callable[[torch.Tensor, slice], torch.Tensor]
_Needs: TypeAlias = tuple[bool, bool, bool]


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
    needs_grad = torch.is_grad_enabled()
    return _TiledTokenLoss.apply(
        hidden, head.weight, head.bias, head, labels, token_loss, temperature, vocab, needs_grad
    )


@torch.no_grad()
def selected_log_probs(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, temperature: float = 1.0, vocab: int | None = None
) -> torch.Tensor:
    """The labels' log-probabilities, float32, shape (positions,), without gradient; see [`tiled_token_loss`]."""
    return tiled_token_loss(hidden, head, labels, lambda log_probs, rows: log_probs, temperature, vocab)[1]


class _TiledTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        head: Head,
        labels: torch.Tensor,
        token_loss: TokenLoss,
        temperature: float,
        vocab: int | None,
        grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs: _Needs = ctx.needs_input_grad[:3] if grad else (False, False, False)
        low = multiplies_in_bfloat16(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            total, log_probs, ctx.gradients = _over_tiles(
                Head(weight, bias, head.scale, head.softcap),
                hidden.detach(),
                labels,
                token_loss,
                temperature,
                vocab,
                low,
                needs,
            )
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden, weight, bias)]
        ctx.mark_non_differentiable(log_probs)
        return total, log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return *take_gradients(ctx, scale), None, None, None, None, None, None


def _over_tiles(
    head: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    token_loss: TokenLoss,
    temperature: float,
    vocab: int | None,
    low: bool,
    needs: _Needs,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    vocab = head_rows(head, hidden) if vocab is None else vocab
    own = Projection(head, vocab, low)
    gradients = [
        torch.zeros_like(value, dtype=torch.float32) if needed and value is not None else None
        for value, needed in zip((hidden, head.weight, head.bias), needs, strict=True)
    ]
    for_hidden, for_weight, for_bias = gradients
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
        if for_hidden is not None:
            for_hidden[rows, : None if own.weight is not None else vocab] = own.to_hidden(gradient)
        if for_weight is not None:
            own.add_to_weight(for_weight, gradient, hidden[rows])
        if for_bias is not None:
            for_bias[:vocab] += gradient.sum(0)
    return total, found, gradients


__all__ = ["TokenLoss", "selected_log_probs", "tiled_token_loss"]
