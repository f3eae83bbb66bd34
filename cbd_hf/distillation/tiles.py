"""
The objective from hidden states, in tiles of positions: the logits of a batch never exist, neither the student's nor
the teacher's.

The gradient is computed with the value, tile by tile, so nothing is projected twice: one product with the teacher's
head and three with the student's, where TRL's `ChunkedDivergenceFunction` takes six.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from cbd_hf.distillation.objectives import Objective, bounded
from cbd_hf.distillation.predictions import DensePredictions, Head, Predictions, SparsePredictions


# Logits of one tile, of which about six live at once: 32 MB in float32, which stays in a CPU's cache; on a GPU 128 MB.
_TILE_VALUES = {"cpu": 2**23}
_TILE_VALUES_ELSEWHERE = 2**25
_LEAST_LOG = -23.0  # 1e-10; a smaller tail has no say

Needs = tuple[bool, bool, bool]
Outcome = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]
Work = Callable[[Head, torch.Tensor, Needs, bool], Outcome]


def tiled_loss(
    hidden: torch.Tensor, head: Head, predictions: Predictions, labels: torch.Tensor, objective: Objective
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The objective summed over positions; float32, whatever the models' dtype.

    Args:
        hidden (`torch.Tensor`): the student's, any float dtype, shape (positions, student hidden).
        head ([`Head`]): the student's.
        predictions ([`DensePredictions`] or [`SparsePredictions`]): the teacher's, for the same positions.
            Vocabularies with different numbers of padding rows are cut to the shorter one. With `weights` (tokens
            sampled from the teacher) only the forward KL divergence is defined.
        labels (`torch.Tensor`): int64, shape (positions,): the next token of each position.
        objective ([`Objective`]): what is summed.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sum, and the divergence's part of it without weight (without
        gradient), float32 scalars. Gradients reach `hidden` and the head's weight and bias.
    """

    def work(head: Head, hidden: torch.Tensor, needs: Needs, low: bool) -> Outcome:
        return _loss_and_gradients(head, hidden, predictions, labels, objective, needs, low)

    return with_gradients(hidden, head, work)


def with_gradients(hidden: torch.Tensor, head: Head, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A loss whose gradient is computed with its value.

    Args:
        hidden (`torch.Tensor`): the student's, any float dtype, shape (positions, student hidden).
        head ([`Head`]): the student's.
        work (`Work`): called once, outside autocast, with the head, the hidden states (both without gradient), which
            of hidden states, weight and bias need a gradient, and whether products are in bfloat16; returns the loss,
            what else is of interest, and these gradients (float32, `None` where none is needed).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the loss, which can be differentiated once; and the other, without
        gradient.
    """
    return _WithGradients.apply(hidden, head.weight, head.bias, head, work, torch.is_grad_enabled())


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        head: Head,
        work: Work,
        grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs = ctx.needs_input_grad[:3] if grad else (False, False, False)
        low = multiplies_in_bfloat16(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            detached = Head(weight, bias, head.scale, head.softcap)
            total, other, ctx.gradients = work(detached, hidden.detach(), needs, low)
        ctx.dtypes = [None if value is None else value.dtype for value in (hidden, weight, bias)]
        ctx.mark_non_differentiable(other)
        return total, other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("This loss has been differentiated already; it can be only once.")
        # Converted when scaled: float16 would lose small gradients before a loss scaler's factor.
        scaled = [g if g is None else g.mul_(scale).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return *scaled, None, None, None


class Projection:
    """
    A head's logits for a tile, and the way back; the matrix is converted once.

    Args:
        head ([`Head`]): any float dtype; without gradient.
        vocab (`int`, *optional*): entries that are taken of it; by default all.
        low (`bool`): multiply in bfloat16 and add up in float32; else all in float32.
    """

    def __init__(self, head: Head, vocab: int | None, low: bool) -> None:
        self.head = head
        self.weight = None
        self.low = low
        if head.weight is not None:
            weight = head.weight.detach()[:vocab]
            self.weight = weight.to(torch.bfloat16 if self.low else torch.float32)
        self.bias = None if head.bias is None else head.bias.detach()[:vocab].float()
        self.vocab = vocab
        # Finite weights make finite logits: only a bias, or logits made elsewhere, can rule a token out.
        self.masks = self.weight is None or (self.bias is not None and bool((self.bias == -torch.inf).any()))

    def raw(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden @ weight.T + bias` in float32."""
        if self.weight is None:
            logits = hidden[:, : self.vocab].float()
            return logits.clone() if logits.data_ptr() == hidden.data_ptr() else logits
        logits = self._product(hidden, self.weight.T)
        return logits if self.bias is None else logits.add_(self.bias)

    def scaled(self, raw: torch.Tensor) -> torch.Tensor:
        """Scale and softcap of raw logits; differentiable."""
        if self.head.scale != 1:
            raw = raw * self.head.scale
        if self.head.softcap is not None:
            raw = torch.tanh(raw / self.head.softcap) * self.head.softcap
        return raw

    def to_hidden(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradient of the hidden states from that of raw logits; float32."""
        return gradient if self.weight is None else self._product(gradient, self.weight)

    def add_to_weight(self, total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add a tile's gradient of the matrix to `total`, float32."""
        if self.low:
            total[: self.vocab].add_(self._product(gradient.T, hidden))
        else:
            total[: self.vocab].addmm_(gradient.T, hidden.float())

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if self.low:
            return torch.mm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32)
        return left.float() @ right.float()


class Gradients:
    """
    Gradients of hidden states and a head, added up tile by tile.

    Args:
        hidden (`torch.Tensor`): shape (positions, hidden), without gradient.
        head ([`Head`]): the head.
        needs (`Needs`): which of hidden states, weight and bias need one.

    Attributes:
        found (`list[torch.Tensor | None]`): float32, in this order; `None` where none is needed.
    """

    def __init__(self, hidden: torch.Tensor, head: Head, needs: Needs) -> None:
        self.hidden = hidden
        self.found: list[torch.Tensor | None] = [
            torch.zeros_like(value, dtype=torch.float32) if needed and value is not None else None
            for value, needed in zip((hidden, head.weight, head.bias), needs, strict=True)
        ]

    def add(self, own: Projection, rows: slice, gradient: torch.Tensor) -> None:
        """Those of a tile, from the gradient of its raw logits, float32, shape (positions of the tile, vocab)."""
        for_hidden, for_weight, for_bias = self.found
        if for_hidden is not None:
            # Added, since tiles may share a position.
            for_hidden[rows, : None if own.weight is not None else own.vocab] += own.to_hidden(gradient)
        if for_weight is not None:
            own.add_to_weight(for_weight, gradient, self.hidden[rows])
        if for_bias is not None:
            for_bias[: own.vocab] += gradient.sum(0)


def head_rows(head: Head, hidden: torch.Tensor) -> int:
    """Entries of a head's vocabulary."""
    return hidden.shape[-1] if head.weight is None else head.weight.shape[0]


def _vocab(own: int, predictions: Predictions, teacher: Head | None) -> int:
    if isinstance(predictions, SparsePredictions):
        theirs = predictions.vocab or own
        if theirs > own:
            raise ValueError(
                f"The cached teacher predicts {theirs} tokens, but the student has {own}: build the cache with "
                f"vocab_size={own}."
            )
        return theirs
    assert teacher is not None
    return min(own, head_rows(teacher, predictions.hidden))


def multiplies_in_bfloat16(hidden: torch.Tensor) -> bool:
    """Whether products take bfloat16 and add up in float32; to be asked inside the caller's autocast."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # float16 has too little range for unscaled gradients; a CPU would round products to the inputs' type.
    return device == "cuda" and dtype == torch.bfloat16


def tile_values(device: torch.device) -> int:
    """Logits of one tile."""
    return _TILE_VALUES.get(device.type, _TILE_VALUES_ELSEWHERE)


def tile_slices(positions: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Positions in slices whose logits stay in a CPU's cache, or small on a GPU."""
    size = max(1, tile_values(device) // vocab)
    return (slice(start, start + size) for start in range(0, positions, size))


def _loss_and_gradients(
    head: Head,
    hidden: torch.Tensor,
    predictions: Predictions,
    labels: torch.Tensor,
    objective: Objective,
    needs: Needs,
    low: bool,
) -> Outcome:
    if isinstance(predictions, DensePredictions):
        with predictions.open_head() as teacher:
            return _over_tiles(head, hidden, predictions, teacher, labels, objective, needs, low)
    return _over_tiles(head, hidden, predictions, None, labels, objective, needs, low)


def _over_tiles(
    head: Head,
    hidden: torch.Tensor,
    predictions: Predictions,
    teacher: Head | None,
    labels: torch.Tensor,
    objective: Objective,
    needs: Needs,
    low: bool,
) -> Outcome:
    vocab = _vocab(head_rows(head, hidden), predictions, teacher)
    own = Projection(head, vocab, low)
    theirs = None
    if teacher is not None and objective.cross_entropy_weight < 1:
        assert isinstance(predictions, DensePredictions)
        theirs = Projection(teacher, vocab, low or multiplies_in_bfloat16(predictions.hidden))
    gradients = Gradients(hidden, head, needs)
    total = hidden.new_zeros((), dtype=torch.float32)
    divergence = total.clone()
    for rows in tile_slices(hidden.shape[0], vocab, hidden.device):
        raw = own.raw(hidden[rows]).requires_grad_(any(needs))
        with torch.set_grad_enabled(any(needs)):
            logits = own.scaled(raw)
        if isinstance(predictions, SparsePredictions):
            value, part, gradient = _sparse_tile(logits, predictions, rows, labels[rows], objective, any(needs))
            if any(needs) and logits is not raw:
                (gradient,) = torch.autograd.grad(logits, raw, gradient)
        else:
            with torch.no_grad():
                target = None if theirs is None else theirs.scaled(theirs.raw(predictions.hidden[rows]))
            with torch.set_grad_enabled(any(needs)):
                masks = (own.masks, theirs is not None and theirs.masks)
                value, part = _dense_tile(logits, target, labels[rows], objective, masks)
            gradient = torch.autograd.grad(value, raw)[0] if any(needs) else None
        total += value.detach()
        divergence += part
        if gradient is None:
            continue
        del raw, logits
        gradients.add(own, rows, gradient)
    return total, divergence, gradients.found


def _dense_tile(
    logits: torch.Tensor,
    target: torch.Tensor | None,
    labels: torch.Tensor,
    objective: Objective,
    masks: tuple[bool, bool] = (True, True),
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The objective and the divergence of a tile; the first is differentiable by `logits`. `masks`: whether logits of the
    student and of the teacher may be -inf.
    """
    weight, temperature = objective.cross_entropy_weight, objective.temperature
    q = F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    total = part = logits.new_zeros(())
    if target is not None:
        p = F.log_softmax(target if temperature == 1 else target / temperature, dim=-1)
        value = objective.divergence(bounded(q) if masks[0] else q, bounded(p) if masks[1] else p).sum()
        total, part = (1 - weight) * value, value.detach()
    if weight:
        log_probs = q if temperature == 1 else F.log_softmax(logits, dim=-1)
        total = total + weight * F.nll_loss(log_probs, labels, reduction="sum")
    return total, part


@torch.no_grad()
def _sparse_tile(
    logits: torch.Tensor,
    predictions: SparsePredictions,
    rows: slice,
    labels: torch.Tensor,
    objective: Objective,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    The objective, the divergence and the gradient of a tile's logits, by hand: the divergence sees k + 1 values a row.

    With `u` the gradient of those (log-probabilities `l` of k tokens and of the rest), the gradient of the logits is
    `q (u_rest / q_rest [not among the k] - sum u) + u [among the k]`.
    """
    weight, temperature = objective.cross_entropy_weight, objective.temperature
    ids = predictions.token_ids[rows]
    scaled = logits.detach() if temperature == 1 else logits.detach() / temperature
    normaliser = scaled.logsumexp(-1, keepdim=True)
    part, gradient, total = logits.new_zeros(()), None, logits.new_zeros(())
    if weight < 1:
        chosen = scaled.gather(-1, ids)
        entries = [chosen - normaliser]
        targets = [predictions.log_probs[rows]]
        if predictions.tail is not None:
            scaled = scaled.clone() if scaled.data_ptr() == logits.data_ptr() else scaled
            rest = scaled.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True) - normaliser
            scaled.scatter_(-1, ids, chosen)
            entries.append(rest.clamp_(min=_LEAST_LOG))
            targets.append(predictions.tail[rows, None].clamp(min=_LEAST_LOG))
        log_q, log_p = torch.cat(entries, -1), bounded(torch.cat(targets, -1))
        with torch.enable_grad():
            log_q.requires_grad_(needs_gradient)
            bounded_q = bounded(log_q)
            if predictions.weights is None:
                value = objective.divergence(bounded_q, log_p).sum()
            elif objective.name == "forward_kl":
                value = (predictions.weights[rows] * (log_p - bounded_q)).sum() * temperature**2
            else:
                raise ValueError(
                    f"objective={objective.name!r} cannot be estimated from tokens sampled from the teacher; "
                    "forward_kl can. Choose it, or a cache of the top k."
                )
        part, total = value.detach(), (1 - weight) * value.detach()
        if needs_gradient:
            (u,) = torch.autograd.grad(value, log_q)
            row = -u.sum(-1, keepdim=True)
            q = (scaled - normaliser).exp_()
            at_ids = u[:, : ids.shape[1]]
            if predictions.tail is None:
                gradient = q.mul_(row).scatter_add_(-1, ids, at_ids)
            else:
                per_rest = u[:, -1:] * (-log_q.detach()[:, -1:]).exp()
                # Written over, not subtracted: where the student leaves little to the rest, `per_rest` is huge.
                at_ids = at_ids + q.gather(-1, ids) * row
                gradient = q.mul_(row + per_rest).scatter_(-1, ids, at_ids)
            gradient.mul_((1 - weight) / temperature)
    if weight:
        log_probs = F.log_softmax(logits.detach(), dim=-1)
        total = total + weight * F.nll_loss(log_probs, labels, reduction="sum")
        if needs_gradient:
            own = log_probs.exp_().scatter_add_(-1, labels[:, None], log_probs.new_full((len(labels), 1), -1.0))
            gradient = own.mul_(weight) if gradient is None else gradient.add_(own, alpha=weight)
    return total, part, gradient


__all__ = [
    "Gradients",
    "Needs",
    "Outcome",
    "Projection",
    "Work",
    "head_rows",
    "multiplies_in_bfloat16",
    "tile_slices",
    "tile_values",
    "tiled_loss",
    "with_gradients",
]
