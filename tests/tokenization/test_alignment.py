"""Spans of two tokenizations: they divide both, cover the same bytes, and cannot be divided further."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cbd_hf.tokenization.alignment import NO_SPAN, align
from cbd_hf.tokenization.encoding import ByteEncoder, Encoded
from tests.tokenization.texts import TEXTS
from tests.tokenization.tokenizers import BUILDERS, LOSSLESS, build


REAL_DATA = Path(os.environ.get("CBD_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
# Directories of tokenizers, separated as in PATH.
REAL_TOKENIZERS = [name for name in os.environ.get("CBD_TEST_TOKENIZERS", "").split(os.pathsep) if name]


@pytest.fixture(scope="module")
def encoders() -> dict[str, ByteEncoder]:
    return {name: ByteEncoder(build(name)) for name in BUILDERS}


def encoded(*bounds: tuple[int, int]) -> Encoded:
    starts, ends = np.array(bounds, dtype=np.int64).reshape(-1, 2).T
    return Encoded(np.arange(len(starts)), starts, ends)


def exact(*lengths: int) -> Encoded:
    ends = np.cumsum(lengths)
    return Encoded(np.arange(len(lengths)), ends - lengths, ends)


def spans(first: Encoded, second: Encoded) -> tuple[list[int], list[int]]:
    numbers = align(first, second)
    assert all(array.dtype == np.int64 for array in numbers)
    return numbers[0].tolist(), numbers[1].tolist()


def reference_spans(first: Encoded, second: Encoded) -> int:
    """The largest number of spans, tried over all pairs of cuts; tokens without bytes cut nothing."""

    def cuts(side: Encoded) -> list[tuple[int, int]]:
        bounds = [(s, e) for s, e in zip(side.starts.tolist(), side.ends.tolist(), strict=True) if e > s]
        return [(end, start) for (_, end), (start, _) in zip(bounds, bounds[1:], strict=False)]

    rows, columns = cuts(first), cuts(second)
    # (cuts in common, minus the byte of the last): more is better, and then the earlier.
    best = [[(0, 0)] * (len(columns) + 1) for _ in range(len(rows) + 1)]
    for i, row in enumerate(rows, 1):
        for j, column in enumerate(columns, 1):
            count, last = best[i - 1][j - 1]
            low = max(row[0], column[0], 1 - last)
            choices = [best[i - 1][j], best[i][j - 1]]
            if low <= min(row[1], column[1]):
                choices.append((count + 1, -low))
            best[i][j] = max(choices)
    return best[-1][-1][0] + 1


def check(first: Encoded, second: Encoded) -> None:
    """What holds for any two tokenizations of one text."""
    if not len(first.ids) or not len(second.ids):
        assert all((side == NO_SPAN).all() for side in align(first, second))
        return
    sides = align(first, second)
    count = reference_spans(first, second)
    for side, tokens in zip(sides, (first, second), strict=True):
        assert len(side) == len(tokens.ids)
        assert side[0] == 0 and side[-1] == count - 1
        assert set(np.diff(side).tolist()) <= {0, 1}
    for span in range(count - 1):
        # A byte at which both may be cut. Tokens without bytes lie behind the cut.
        low, high = 0, 1 << 30
        for side, tokens in zip(sides, (first, second), strict=True):
            covers = tokens.ends > tokens.starts
            low = max(low, tokens.ends[covers & (side <= span)].max())
            high = min(high, tokens.starts[covers & (side > span)].min())
        assert low <= high


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS, special_tokens=st.booleans())
def test_all_pairs(encoders: dict[str, ByteEncoder], text: str, special_tokens: bool) -> None:
    sides = {name: encoder.encode([text], special_tokens=special_tokens)[0] for name, encoder in encoders.items()}
    for first, second in product(sides.values(), repeat=2):
        check(first, second)
    for first, second in product(LOSSLESS, repeat=2):
        check_bytes(text, sides[first], sides[second])


def check_bytes(text: str, first: Encoded, second: Encoded) -> None:
    """Spans of exact tokenizations: the same bytes on both sides, and together the text."""
    raw = text.encode()
    if any([0, *side.ends.tolist()] != [*side.starts.tolist(), len(raw)] for side in (first, second)):
        return  # spaces are dropped, or characters cannot be divided
    joined = []
    for span_ids, side in zip(align(first, second), (first, second), strict=True):
        parts = [b""] * (int(span_ids.max(initial=-1)) + 1)
        for span, start, end in zip(span_ids.tolist(), side.starts.tolist(), side.ends.tolist(), strict=True):
            parts[span] += raw[start:end]
        joined.append(parts)
    assert joined[0] == joined[1]
    assert b"".join(joined[0]) == raw
    assert all(joined[0])


@given(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=2, max_size=2))
def test_exact_cuts(lengths: list[list[int]]) -> None:
    """Any two divisions of the same bytes; tokens of length 0 among them."""
    total = max(sum(side) for side in lengths)
    check(*(exact(*side, *([total - sum(side)] * (sum(side) < total))) for side in lengths))


@given(st.data())
def test_uncertain_cuts(data: st.DataObject) -> None:
    """Tokens with gaps between them, and tokens that share characters."""

    def side() -> Encoded:
        points = sorted(data.draw(st.lists(st.integers(0, 14), min_size=2, max_size=16)))
        shared = data.draw(st.lists(st.integers(0, 2), min_size=len(points), max_size=len(points)))
        starts, ends = np.array(points[0::2][: len(points) // 2]), np.array(points[1::2])
        ends = np.maximum.accumulate(np.minimum(ends + np.array(shared[1::2]), 16))
        return Encoded(np.arange(len(ends)), starts, ends)

    check(side(), side())


def test_spans_of_exact_tokens() -> None:
    assert spans(exact(5, 6), exact(5, 6)) == ([0, 1], [0, 1])
    assert spans(exact(5, 6), exact(3, 2, 1, 5)) == ([0, 1], [0, 0, 1, 1])
    assert spans(exact(3, 3, 3), exact(4, 4, 1)) == ([0, 0, 0], [0, 0, 0])
    assert spans(exact(11), exact(1, 10)) == ([0], [0, 0])


def test_tokens_without_bytes() -> None:
    # A lone prefix before the first word, something dropped in the middle and at the end.
    assert spans(exact(0, 5, 6), exact(5, 6)) == ([0, 0, 1], [0, 1])
    assert spans(exact(5, 0, 6), exact(5, 6)) == ([0, 1, 1], [0, 1])
    assert spans(exact(5, 6, 0), exact(5, 6)) == ([0, 1, 1], [0, 1])
    assert spans(exact(5, 0, 6), exact(5, 0, 6)) == ([0, 1, 1], [0, 1, 1])
    assert spans(exact(0), exact(5, 6)) == ([0], [0, 0])


def test_uncertain_bytes() -> None:
    # "ab cd" with its space dropped, against a cut before the space, behind it, and both.
    dropped = encoded((0, 2), (3, 5))
    assert spans(dropped, exact(2, 3)) == ([0, 1], [0, 1])
    assert spans(dropped, exact(3, 2)) == ([0, 1], [0, 1])
    assert spans(dropped, exact(2, 1, 2)) == ([0, 1], [0, 1, 1])
    assert spans(dropped, dropped) == ([0, 1], [0, 1])
    # Two tokens of one character: nothing divides them, though the other side does.
    assert spans(encoded((0, 1), (1, 4), (1, 4), (4, 5)), exact(1, 1, 2, 1)) == ([0, 1, 1, 2], [0, 1, 1, 2])
    # One wide cut can be used once, whichever cuts of the other side lie in it.
    assert spans(encoded((0, 1), (6, 8)), encoded((0, 1), (3, 4), (6, 8))) == ([0, 1], [0, 1, 1])
    assert spans(encoded((0, 1), (3, 4), (6, 8)), encoded((0, 1), (6, 8))) == ([0, 1, 1], [0, 1])
    assert spans(encoded((0, 1), (3, 4), (7, 9)), encoded((0, 1), (6, 7), (7, 9))) == ([0, 1, 2], [0, 1, 2])


def test_nothing_to_align() -> None:
    assert spans(exact(), exact()) == ([], [])
    assert spans(exact(), exact(2, 1)) == ([], [NO_SPAN, NO_SPAN])
    assert spans(exact(3), exact()) == ([NO_SPAN], [])


@pytest.mark.skipif(not (REAL_DATA / "models").is_dir(), reason="no real models; set CBD_TEST_DATA")
@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_stories260k(encoders: dict[str, ByteEncoder], text: str) -> None:
    check_real(encoders["byte_level"], _real_encoder(str(REAL_DATA / "models" / "stories260k")), text)


@pytest.mark.skipif(len(REAL_TOKENIZERS) < 2, reason="set CBD_TEST_TOKENIZERS to two or more directories")
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_real_tokenizers(text: str) -> None:
    for first, second in product(REAL_TOKENIZERS, repeat=2):
        check_real(_real_encoder(first), _real_encoder(second), text)


_REAL: dict[str, ByteEncoder] = {}


def _real_encoder(directory: str) -> ByteEncoder:
    if directory not in _REAL:
        _REAL[directory] = ByteEncoder(AutoTokenizer.from_pretrained(directory))
    return _REAL[directory]


def check_real(first: ByteEncoder, second: ByteEncoder, text: str) -> None:
    sides = [encoder.encode([text])[0] for encoder in (first, second)]
    for encoder, side in zip((first, second), sides, strict=True):
        assert side.ids.tolist() == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    check(*sides)
    check_bytes(text, *sides)
