"""Spans numbered over a batch, and tiles that divide none of them."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbd_hf.distillation import tiles
from cbd_hf.distillation.batching import supervised_positions
from cbd_hf.distillation.bridge.spans import Alignment, followed, number_spans
from cbd_hf.distillation.bridge.student import AlignedPredictions
from cbd_hf.distillation.bridge.tiles import span_tiles
from cbd_hf.distillation.predictions import DensePredictions, Head

from .helpers import random_batch


VOCABS = (7, 11)
SEGMENT = st.one_of(
    st.tuples(st.just(True), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.just(False), st.integers(0, 9), st.integers(0, 9)),
)


def alignment_of(segments: list[tuple[bool, int, int]]) -> Alignment:
    spans: list[list[int]] = [[], []]
    count = 0
    for is_span, *sizes in segments:
        for numbers, size in zip(spans, sizes, strict=True):
            numbers += [count if is_span else -1] * size
        count += is_span
    own, others = (torch.tensor(numbers, dtype=torch.int64) for numbers in spans)
    return Alignment(own, others, torch.zeros_like(others), count)


@settings(max_examples=300, deadline=None)
@given(st.lists(SEGMENT, max_size=12), st.sampled_from([1, 18, 40, 100, 10**6]), st.booleans())
def test_tiles(segments: list[tuple[bool, int, int]], limit: int, cached: bool) -> None:
    """Every position of the student and every span is in one tile, with all its tokens; tiles are no larger."""
    alignment = alignment_of(segments)
    vocab, source_vocab = VOCABS[0], 0 if cached else VOCABS[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles._TILE_VALUES, "cpu", limit)
        found = list(span_tiles(alignment, vocab, source_vocab))
    positions = [i for here, _, _ in found for i in range(here.start, here.stop)]
    assert positions == list(range(len(alignment.spans)))
    assert [n for _, _, spans in found for n in range(spans.start, spans.stop)] == list(range(alignment.count))
    others = [i for _, there, _ in found for i in range(there.start, there.stop)]
    assert others == sorted(set(others))
    for here, there, spans in found:
        inside = set(range(spans.start, spans.stop))
        for numbers, tile in ((alignment.spans, here), (alignment.source_spans, there)):
            assert set(numbers[tile].tolist()) - {-1} == inside
            outside = [*numbers[: tile.start].tolist(), *numbers[tile.stop :].tolist()]
            assert not inside & set(outside)
        values = (here.stop - here.start) * vocab + (there.stop - there.start) * source_vocab
        assert here.stop > here.start
        assert values <= max(limit, vocab) or len(inside) == 1
        if len(inside) == 1 and values > limit:  # nothing but the span
            assert (alignment.spans[here] >= 0).all() and (alignment.source_spans[there] >= 0).all()
    if limit == 10**6:
        assert len([spans for _, _, spans in found if spans.stop > spans.start]) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_numbers(seed: int) -> None:
    """As one would count them, row by row; rows without spans and without supervised tokens included."""
    rng = random.Random(seed)
    batch, rows = random_batch(rng, 6)
    chosen, there = (supervised_positions(batch[name]) for name in ("labels", "source_labels"))
    own, others, count = number_spans(batch, chosen, there)
    places = chosen.nonzero().tolist()
    behind = [*places[1:], [-1, -1]]
    assert followed(chosen).tolist() == [
        [row, column + 1] == other for (row, column), other in zip(places, behind, strict=True)
    ]
    expected: list[list[int]] = [[], []]
    before = 0
    for row in rows:
        for numbers, side in zip(expected, ("", "source_"), strict=True):
            for label, span in zip(row[side + "labels"][1:], row[side + "spans"][1:], strict=True):
                if label != -100:
                    numbers.append(before + span if span >= 0 else -1)
        before += max(row["spans"]) + 1
    assert own.tolist() == expected[0] and others.tolist() == expected[1] and count == before > 0
    for numbers in (own, others):
        named = numbers[numbers >= 0]
        assert (named.diff() >= 0).all() and set(named.tolist()) == set(range(count))


def test_hidden_states_in_front_of_spans() -> None:
    """Those that predict each span's first token."""
    alignment = alignment_of([(False, 1, 2), (True, 2, 3), (True, 1, 1), (False, 2, 1), (True, 1, 2)])
    states = torch.arange(9.0)[:, None].repeat(1, 4)
    source = DensePredictions(states, Head().open, (states, states + 100))
    layers = AlignedPredictions(source, alignment).layers
    assert [layer[:, 0].tolist() for layer in layers] == [[2, 5, 7], [102, 105, 107]]
    moved = AlignedPredictions(source, alignment).to(torch.device("cpu"))
    assert torch.equal(moved.layers[1], layers[1])
