"""
A span objective from hidden states, in tiles of spans: the logits of a batch never exist, of neither model.

The gradient is computed with the value, as in [`~cbd_hf.distillation.tiles.tiled_loss`].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cbd_hf.distillation.bridge.objectives import LEAST_LOG, Side, SpanObjective, Vocabularies
from cbd_hf.distillation.bridge.spans import Alignment, join_spans, last_positions
from cbd_hf.distillation.predictions import DensePredictions, Head, Predictions, SparsePredictions
from cbd_hf.distillation.tiles import (
    Gradients,
    Needs,
    Outcome,
    Projection,
    head_rows,
    multiplies_in_bfloat16,
    tile_slices,
    tile_values,
    with_gradients,
)


def tiled_span_loss(
    hidden: torch.Tensor,
    head: Head,
    predictions: Predictions,
    labels: torch.Tensor,
    alignment: Alignment,
    vocabularies: Vocabularies,
    objective: SpanObjective,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The objective summed over spans and tokens; float32, whatever the models' dtype.

    Args:
        hidden (`torch.Tensor`): the student's, any float dtype, shape (positions, student hidden).
        head ([`Head`]): the student's.
        predictions ([`DensePredictions`] or [`SparsePredictions`]): the source's, at its own supervised positions.
        labels (`torch.Tensor`): int64, shape (positions,): the next token of each of the student's positions.
        alignment ([`Alignment`]): of the two.
        vocabularies ([`Vocabularies`]): of the two.
        objective ([`SpanObjective`]): what is summed.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sum, and the part of it over spans without its weight (without
        gradient), float32 scalars. Gradients reach `hidden` and the head's weight and bias.
    """

    def work(head: Head, hidden: torch.Tensor, needs: Needs, low: bool) -> Outcome:
        opened = predictions.open_head() if isinstance(predictions, DensePredictions) else nullcontext(None)
        compares = objective.objective.cross_entropy_weight < 1
        with opened as source:
            theirs = None
            if compares and source is not None and isinstance(predictions, DensePredictions):
                theirs = Projection(source, None, low or multiplies_in_bfloat16(predictions.hidden))
            own = Projection(head, None, low)
            spans = alignment
            if compares and objective.sees_ends:
                ends = _source_boundaries(predictions, theirs, vocabularies, objective)
                spans = join_spans(alignment, ends, objective.alm_bias_threshold)
            tiles = _Tiles(own, theirs, predictions, labels, spans, vocabularies, objective)
            return tiles.run(hidden, head, needs)

    return with_gradients(hidden, head, work)


@dataclass(frozen=True)
class _Tiles:
    """What every tile needs."""

    own: Projection
    theirs: Projection | None
    predictions: Predictions
    labels: torch.Tensor
    alignment: Alignment
    vocabularies: Vocabularies
    objective: SpanObjective

    def run(self, hidden: torch.Tensor, head: Head, needs: Needs) -> Outcome:
        """The sum, the spans' part of it, and gradients of hidden states, weight and bias; float32."""
        own = self.own
        gradients = Gradients(hidden, head, needs)
        total = hidden.new_zeros((), dtype=torch.float32)
        spans_part = total.clone()
        vocab = head_rows(head, hidden)
        source_vocab = len(self.vocabularies.source_groups) if self.theirs is not None else 0
        for here, there, spans in span_tiles(self.alignment, vocab, source_vocab):
            # With the next position, which says what follows the last span.
            seen = slice(here.start, here.stop + self.objective.sees_ends)
            raw = own.raw(hidden[seen]).requires_grad_(any(needs))
            with torch.set_grad_enabled(any(needs)):
                value, part = self._tile(own.scaled(raw), here, there, spans)
            total += value.detach()
            spans_part += part
            if not any(needs):
                continue
            (gradient,) = torch.autograd.grad(value, raw)
            gradients.add(own, seen, gradient)
        return total, spans_part, gradients.found

    def _tile(
        self, logits: torch.Tensor, here: slice, there: slice, spans: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        objective = self.objective.objective
        weight, temperature = objective.cross_entropy_weight, objective.temperature
        labels = self.labels[here]
        q = F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
        total = part = logits.new_zeros(())
        seen, q = q, q[: len(labels)]
        if weight < 1 and (spans.stop > spans.start or self.objective.every_token):
            student = self._side(q, labels, self.alignment.spans[here], spans, self.vocabularies.student_groups)
            if self.objective.sees_ends:
                student = student._replace(ends=self._ends(seen, student, spans))
            value = self.objective.over_spans(student, self._source(there, spans), self.vocabularies)
            total, part = (1 - weight) * value, value.detach()
        if weight or (logits.requires_grad and total.grad_fn is None):
            log_probs = q if temperature == 1 else F.log_softmax(logits[: len(labels)], dim=-1)
            total = total + weight * F.nll_loss(log_probs, labels, reduction="sum")
        return total, part

    def _ends(self, seen: torch.Tensor, student: Side, spans: slice) -> torch.Tensor:
        """The student's log-probability that each span is followed by a token that begins anew."""
        assert self.alignment.ended is not None and self.vocabularies.student_boundaries is not None
        ended = self.alignment.ended[spans]
        after = last_positions(student.spans, len(ended))[ended] + 1
        ends = seen.new_zeros(len(ended))
        return ends.index_put((ended,), _boundary_mass(seen[after], self.vocabularies.student_boundaries))

    @torch.no_grad()
    def _source(self, there: slice, spans: slice) -> Side:
        side = self._source_side(there, spans)
        ends = self.alignment.source_ends
        return side if ends is None else side._replace(ends=ends[spans])

    def _source_side(self, there: slice, spans: slice) -> Side:
        labels, numbers = self.alignment.source_labels[there], self.alignment.source_spans[there]
        groups, temperature = self.vocabularies.source_groups, self.objective.objective.temperature
        if isinstance(self.predictions, SparsePredictions):
            kept = self.predictions.rows(there)
            if kept.labels is None:
                raise ValueError("The source's cache has no log-probabilities of the labels: see `labels` of a cache.")
            return self._side(kept.log_probs, labels, numbers, spans, groups, kept.labels)._replace(kept=kept)
        assert self.theirs is not None
        logits = self.theirs.scaled(self.theirs.raw(self.predictions.hidden[there]))
        p = F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
        return self._side(p, labels, numbers, spans, groups)

    @staticmethod
    def _side(
        log_probs: torch.Tensor,
        labels: torch.Tensor,
        numbers: torch.Tensor,
        spans: slice,
        groups: torch.Tensor,
        token_log_probs: torch.Tensor | None = None,
    ) -> Side:
        inside = numbers >= 0
        local = torch.where(inside, numbers - spans.start, -1)
        count = spans.stop - spans.start
        counts = torch.zeros(count, dtype=torch.int64, device=labels.device).index_add(
            0, local[inside], torch.ones_like(local[inside])
        )
        places = inside.nonzero().flatten()
        starts = places[counts.cumsum(0) - counts]
        if token_log_probs is None:
            token_log_probs = log_probs.gather(-1, labels[:, None]).flatten()
        return Side(log_probs, token_log_probs, local, starts, groups[labels[starts]], counts)


@torch.no_grad()
def _source_boundaries(
    predictions: Predictions, theirs: Projection | None, vocabularies: Vocabularies, objective: SpanObjective
) -> torch.Tensor:
    """The source's log-probability, at each of its positions, that the token that follows begins anew; float32."""
    begins = vocabularies.source_boundaries
    if begins is None:
        raise ValueError("alm_debias needs the tokens that begin anew: see `boundaries` of Vocabularies.")
    if isinstance(predictions, SparsePredictions):
        # The share among the kept tokens: the mass of the others is not known to be on either side.
        known = predictions.log_probs
        found = _boundary_mass(known, begins[predictions.token_ids]) - known.logsumexp(-1)
        return found.clamp(min=LEAST_LOG)
    assert theirs is not None
    hidden, temperature = predictions.hidden, objective.objective.temperature
    found = hidden.new_zeros(len(hidden), dtype=torch.float32)
    for rows in tile_slices(len(hidden), len(begins), hidden.device):
        logits = theirs.scaled(theirs.raw(hidden[rows])) / temperature
        found[rows] = _boundary_mass(logits, begins) - logits.logsumexp(-1)
    return found


def _boundary_mass(log_probs: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum over the tokens that begin anew."""
    return torch.where(begins, log_probs, -torch.inf).logsumexp(-1)


def span_tiles(alignment: Alignment, vocab: int, source_vocab: int) -> Iterator[tuple[slice, slice, slice]]:
    """
    Tiles that divide no span: the student's positions, the source's positions and the spans of each.

    The student's positions without a span are in the tile of the span before them, or in tiles without spans; the
    source's are left out at a tile's ends. A tile's logits, of both models together, are about as many as in
    [`~cbd_hf.distillation.tiles.tiled_loss`], or those of one span.

    Args:
        alignment ([`Alignment`]): of the batch.
        vocab, source_vocab (`int`): entries of the models' logits; 0 where there are none.
    """
    positions = len(alignment.spans)
    limit = tile_values(alignment.spans.device)
    step = max(1, limit // max(1, vocab))

    def plain(start: int, stop: int) -> Iterator[tuple[slice, slice, slice]]:
        for first in range(start, stop, step):
            yield slice(first, min(stop, first + step)), slice(0, 0), slice(0, 0)

    own_ends, here = _span_ends(alignment.spans, alignment.count)
    source_ends, there = _span_ends(alignment.source_spans, alignment.count)
    cost = (here * vocab + there * source_vocab).cpu()
    first = 0
    # What lies before the first span.
    start, other = (
        int((numbers < 0).long().cumprod(0).sum()) if alignment.count else 0
        for numbers in (alignment.spans, alignment.source_spans)
    )
    yield from plain(0, start)
    while first < alignment.count:
        reached = int(cost[first - 1]) if first else start * vocab + other * source_vocab
        last = max(int(torch.searchsorted(cost, reached + limit, right=True)), first + 1)
        stop = int(own_ends[last - 1])
        yield slice(start, stop), slice(other, int(source_ends[last - 1])), slice(first, last)
        first, start, other = last, int(here[last - 1]), int(there[last - 1])
        yield from plain(stop, start)
    if not alignment.count:
        yield from plain(0, positions)


def _span_ends(numbers: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The position behind each span's last token, and that behind what follows it without a span; int64, (count,)."""
    ends = last_positions(numbers, count) + 1
    if not count:
        return ends.cpu(), ends.cpu()
    starts = torch.searchsorted(numbers.cummax(0).values, torch.arange(1, count, device=numbers.device))
    return ends.cpu(), torch.cat([starts, ends.new_tensor([len(numbers)])]).cpu()


__all__ = ["span_tiles", "tiled_span_loss"]
