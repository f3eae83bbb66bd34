"""The spans of a batch: numbered over its rows, and joined where a span's end is no end to the source."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


# Text without white space has no ends that a source expects, and a span's logits are all in memory at once.
MOST_JOINED = 16


@dataclass(frozen=True)
class Alignment:
    """
    The spans of a micro-batch, at the supervised positions of each model, rows one behind the other.

    Args:
        spans, source_spans (`torch.Tensor`): int64, shapes (positions,) and (source positions,): the span of the token
            that follows, numbered over the batch and ascending; -1 for none.
        source_labels (`torch.Tensor`): int64, shape (source positions,): those tokens of the source.
        count (`int`): spans.
        follows, source_follows (`torch.Tensor`, *optional*): bool, shapes (positions,) and (source positions,):
            whether the next position is the next token of the same row. By default always.
        ended (`torch.Tensor`, *optional*): bool, shape (spans,): whether both models say what follows the span.
        source_ends (`torch.Tensor`, *optional*): float32, shape (spans,): the source's log-probability that a span is
            followed by a token that begins anew; 0 where `ended` is `False`.
    """

    spans: torch.Tensor
    source_spans: torch.Tensor
    source_labels: torch.Tensor
    count: int
    follows: torch.Tensor | None = None
    source_follows: torch.Tensor | None = None
    ended: torch.Tensor | None = None
    source_ends: torch.Tensor | None = None

    def to(self, device: torch.device) -> Alignment:
        """On another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


def number_spans(
    batch: dict[str, torch.Tensor], chosen: torch.Tensor, source_chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """
    Spans, which a collator numbers in each row from 0, numbered over a batch.

    Args:
        batch (`dict[str, torch.Tensor]`): with `spans` and `source_spans`, shape (rows, length) each.
        chosen, source_chosen (`torch.Tensor`): bool, shape (rows, length): positions whose next token is supervised.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, int]`: the span of each of these next tokens, on each side; how many.
    """

    def following(name: str, positions: torch.Tensor) -> torch.Tensor:
        # A blank row has spans, but nothing supervised.
        return torch.where(positions, F.pad(batch[name][:, 1:], (0, 1), value=-1), -1)

    own, others = following("spans", chosen), following("source_spans", source_chosen)
    counts = own.amax(-1) + 1
    first = (counts.cumsum(0) - counts)[:, None]
    spans, source_spans = (torch.where(numbers < 0, -1, numbers + first) for numbers in (own, others))
    return spans[chosen], source_spans[source_chosen], int(counts.sum())


def followed(chosen: torch.Tensor) -> torch.Tensor:
    """
    Which of the chosen positions stand in front of another one of the same row.

    Args:
        chosen (`torch.Tensor`): bool, shape (rows, length).

    Returns:
        `torch.Tensor`: bool, shape (chosen positions,).
    """
    return F.pad(chosen[:, 1:], (0, 1), value=False)[chosen]


def last_positions(spans: torch.Tensor, count: int) -> torch.Tensor:
    """The position of each span's last token; int64, shape (count,)."""
    inside = spans >= 0
    places = torch.arange(len(spans), device=spans.device)
    last = torch.zeros(count, dtype=torch.int64, device=spans.device)
    return last.scatter_reduce(0, spans[inside], places[inside], "amax")


def join_spans(alignment: Alignment, boundaries: torch.Tensor, threshold: float) -> Alignment:
    """
    Spans joined with those behind them until the source expects an end, at most [`MOST_JOINED`] to one.

    A model that writes " international" as one token gives the token " intern" little, however likely that text is.
    Likelihoods of two models compare where the text surely ends, in front of white space or a special token (arXiv
    2503.20083, debiasing of chunks' ends).

    Args:
        alignment ([`Alignment`]): of single spans.
        boundaries (`torch.Tensor`): float32, shape (source positions,): the source's log-probability that the token
            that follows begins anew.
        threshold (`float`): a span ends where that probability is above it; 0 joins nothing.

    Returns:
        [`Alignment`]: with `ended` and `source_ends`. Spans are joined only where they touch on both sides.
    """
    if not alignment.count:
        return replace(alignment, ended=alignment.spans.new_zeros(0, dtype=torch.bool), source_ends=boundaries[:0])
    after, there = _behind(alignment.spans, alignment.follows, alignment.count)
    source_after, source_there = _behind(alignment.source_spans, alignment.source_follows, alignment.count)
    ended = there & source_there
    following = torch.arange(1, alignment.count + 1, device=boundaries.device)
    touching = (alignment.spans[after] == following) & (alignment.source_spans[source_after] == following) & ended
    behind = boundaries[source_after]
    joined = touching & (behind <= math.log(threshold)) if threshold else torch.zeros_like(touching)
    # Counted from where each joined span begins, so that the place in a batch does not matter.
    places = following - 1
    begins = F.pad(~joined, (1, 0), value=True)[:-1]
    joined &= (places - torch.where(begins, places, 0).cummax(0).values + 1) % MOST_JOINED != 0
    numbers = F.pad((~joined).long().cumsum(0), (1, 0))[:-1]
    closing = (~joined).nonzero().flatten()

    def renumbered(spans: torch.Tensor) -> torch.Tensor:
        return torch.where(spans < 0, -1, numbers[spans.clamp(min=0)])

    ended = ended[closing]
    return replace(
        alignment,
        spans=renumbered(alignment.spans),
        source_spans=renumbered(alignment.source_spans),
        count=len(closing),
        ended=ended,
        source_ends=torch.where(ended, behind[closing], 0.0),
    )


def _behind(spans: torch.Tensor, follows: torch.Tensor | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The position behind each span's last token, and whether there is one in its row; shape (count,)."""
    last = last_positions(spans, count)
    there = last + 1 < len(spans)
    if follows is not None:
        there &= follows[last]
    return (last + 1).clamp(max=len(spans) - 1), there


__all__ = ["MOST_JOINED", "Alignment", "followed", "join_spans", "last_positions", "number_spans"]
