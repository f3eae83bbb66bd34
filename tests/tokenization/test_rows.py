"""Rows made by hand: which tokens are supervised, which are spans, and where both sides are cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from cbd_hf.tokenization.encoding import Encoded
from cbd_hf.tokenization.rows import (
    COLUMNS,
    Reading,
    SpecialIds,
    Tokens,
    alignment_statistics,
    check_rows,
    joined,
    plain_reading,
    tokens_of,
)


NONE = SpecialIds(None, None, np.zeros(0, np.int64))
BOTH = SpecialIds(1, 2, np.array([1, 2]))


def tokenized(reading: Reading, *pieces: str, special: SpecialIds = NONE) -> Tokens:
    """Ids from 10 on, one for each piece of an ASCII text."""
    assert "".join(pieces) == reading.text
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    ids = 10 + np.arange(len(pieces))
    return tokens_of(reading, Encoded(ids, ends - [len(piece) for piece in pieces], ends), special)


def lists(row: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: value.tolist() for name, value in row.items()}


def test_text() -> None:
    """BOS has no label and no counterpart; a row's first token cannot be predicted; EOS is a span."""
    reading = plain_reading("abcd e")
    row = lists(joined(tokenized(reading, "ab", "cd", " ", "e"), tokenized(reading, "ab", "c", "d", " e")))
    assert row["input_ids"] == row["labels"] == [10, 11, 12, 13]
    assert row["spans"] == [-1, 0, 1, 1] and row["source_spans"] == [-1, 0, 0, 1]
    row = lists(
        joined(
            tokenized(reading, "ab", "cd", " e", special=BOTH),
            tokenized(reading, "ab", "cd", " e", special=SpecialIds(7, 8, np.array([7, 8]))),
        )
    )
    assert row["input_ids"] == [1, 10, 11, 12, 2] and row["labels"] == [-100, 10, 11, 12, 2]
    assert row["source_input_ids"] == [7, 10, 11, 12, 8]
    assert row["spans"] == row["source_spans"] == [-1, 0, 1, 2, 3]


def test_end_on_one_side() -> None:
    reading = plain_reading("ab")
    row = lists(
        joined(tokenized(reading, "a", "b", special=SpecialIds(None, 2, np.array([2]))), tokenized(reading, "a", "b"))
    )
    assert row["labels"] == [10, 11, 2] and row["spans"] == [-1, 0, -1]
    assert row["source_labels"] == [10, 11] and row["source_spans"] == [-1, 0]


def test_completion() -> None:
    """A span over the completion's first byte is not supervised on either side."""
    reading = plain_reading("abcdef", supervised_from=3)
    row = lists(joined(tokenized(reading, "ab", "cd", "e", "f"), tokenized(reading, "abc", "d", "ef")))
    assert row["labels"] == [-100, -100, 12, 13] and row["source_labels"] == [-100, 11, 12]
    assert row["spans"] == [-1, -1, 0, 0] and row["source_spans"] == [-1, -1, 0]


def test_passages() -> None:
    """Tokens over a passage's edge have no span; what one side has trimmed is not common."""
    student = plain_reading("xy", " abc ", supervised_from=2)
    source = Reading(
        text="<xy>abc!",
        passages=np.array([[1, 3], [4, 7]]),
        trimmed=np.array([[0, 0], [1, 1]]),
        aligned=np.ones(2, bool),
        closed=np.array([False, True]),
        supervised=np.array([[4, 8]]),
        plain=False,
    )
    special = SpecialIds(None, 2, np.array([2, 13]))
    row = lists(
        joined(
            tokenized(student, "xy", " ", "a", "bc", " ", special=special),
            tokenized(source, "<xy", ">a", "bc", "!", special=special),
        )
    )
    assert row["spans"] == [-1, -1, -1, 0, -1, 1] and row["source_spans"] == [-1, -1, 0, 1]
    assert row["labels"] == [-100, 11, 12, 13, 14, 2] and row["source_labels"] == [-100, -100, 12, 13]


def test_unaligned_passages() -> None:
    """A passage that lies elsewhere on one side is left out."""
    parts = {"trimmed": np.zeros((2, 2), int), "closed": np.zeros(2, bool), "plain": False}
    everything = np.array([[0, 1 << 62]])
    first = Reading("sab", np.array([[0, 1], [1, 3]]), aligned=np.ones(2, bool), supervised=everything, **parts)
    second = Reading(
        "abs", np.array([[2, 3], [0, 2]]), aligned=np.array([False, True]), supervised=everything, **parts
    )
    row = lists(joined(tokenized(first, "s", "a", "b"), tokenized(second, "a", "b", "s")))
    assert row["spans"] == [-1, -1, 0] and row["source_spans"] == [-1, 0, -1]
    assert lists(joined(tokenized(first, "s", "a", "b"), tokenized(second, "ab", "s")))["spans"] == [-1, -1, -1]


def test_nothing_to_read() -> None:
    row = lists(joined(tokenized(plain_reading("")), tokenized(plain_reading(""))))
    assert row == {name: [] for name in COLUMNS}


def test_prompt_fills_the_row() -> None:
    """Prompts that differ have no common cut: both sides are cut to their limits, and nothing is supervised."""
    student = plain_reading("p", "abc", supervised_from=1)
    source = Reading(
        text="user: abc",
        passages=np.array([[0, 0], [6, 9]]),
        trimmed=np.array([[0, 1], [0, 0]]),
        aligned=np.ones(2, bool),
        closed=np.zeros(2, bool),
        supervised=np.array([[6, 9]]),
        plain=False,
    )
    sides = tokenized(student, "p", "a", "bc"), tokenized(source, "us", "er", ":", " ", "abc")
    assert lists(joined(*sides))["source_spans"] == [-1, -1, -1, -1, 0]
    row = lists(joined(*sides, 10, 4))
    assert row["input_ids"] == [10, 11, 12] and row["source_input_ids"] == [10, 11, 12, 13]
    assert {*row["labels"], *row["source_labels"]} == {-100} and {*row["spans"], *row["source_spans"]} == {-1}


def partitions(size: int) -> st.SearchStrategy[list[int]]:
    """Ends of pieces of a text."""
    return st.sets(st.integers(1, size - 1)).map(lambda inner: [*sorted(inner), size])


@given(ends=st.integers(2, 24).flatmap(lambda n: st.tuples(partitions(n), partitions(n))), data=st.data())
def test_cut_at_the_same_byte(ends: tuple[list[int], list[int]], data: st.DataObject) -> None:
    size = ends[0][-1]
    limits = [data.draw(st.integers(1, size + 2)) for _ in range(2)]
    supervised_from = data.draw(st.integers(0, size - 1))
    text = "".join(chr(97 + index) for index in range(size))
    reading = plain_reading(text, supervised_from=supervised_from)
    pieces = [[text[a:b] for a, b in zip([0, *side], side, strict=False)] for side in ends]
    special = SpecialIds(None, 2, np.array([2]))
    sides = [tokenized(reading, *part, special=special) for part in pieces]
    row = joined(*sides, *limits)
    whole = all(len(part) + 1 <= limit for part, limit in zip(pieces, limits, strict=True))
    common = sorted(set(ends[0]) & set(ends[1]))
    fitting = [end for end in common if all(side.index(end) < limit for side, limit in zip(ends, limits, strict=True))]
    cuts = [0, *(end for end in common if whole or end <= max(fitting, default=0))]
    pairs = zip(cuts, cuts[1:], strict=False)
    kept = [text[start:end] for start, end in pairs if start >= max(supervised_from, 1)] + ["EOS"] * whole
    spans: dict[int, list[str]] = {}
    for prefix, part, side, limit in zip(("", "source_"), pieces, ends, limits, strict=True):
        ids, numbers, labels = (row[prefix + name].tolist() for name in ("input_ids", "spans", "labels"))
        expected = [*range(10, 10 + len(part)), 2]
        starts = [0, *side]
        if kept:
            assert ids == (expected if whole else expected[: side.index(fitting[-1]) + 1])
            assert labels == [i if start >= supervised_from else -100 for i, start in zip(ids, starts, strict=False)]
        else:
            assert ids == expected[:limit] and set(labels) == {-100}
        read = [*part, "EOS"]
        for number in range(max(numbers) + 1):
            members = [index for index, value in enumerate(numbers) if value == number]
            assert members == [*range(members[0], members[-1] + 1)] and members[0] > 0
            assert all(labels[index] == ids[index] for index in members)
            spans.setdefault(number, []).append("".join(read[index] for index in members))
    assert [*spans.values()] == [[part, part] for part in kept]


def prepared(**row: list[int]) -> dict[str, Any]:
    return {"input_ids": row["labels"], "source_input_ids": row["source_spans"]} | row


FULL = prepared(labels=[5, 6, 7, 8], spans=[-1, 0, 1, 1], source_labels=[5, 6, 7], source_spans=[-1, 0, 1])
EMPTY = prepared(labels=[-100, -100, -100], spans=[-1, -1, -1], source_labels=[-100], source_spans=[-1])


def test_rows_without_answers() -> None:
    check_rows([FULL, FULL])
    with pytest.warns(
        UserWarning, match=r"1 of 2 rows.*the first is row 1, whose prompt takes 3 tokens of the student or more"
    ):
        check_rows([FULL, EMPTY], 3)
    with pytest.raises(ValueError, match=r"2 of 2 rows .* max_length=3 and source_max_length=6.*drop_long_prompts"):
        check_rows(Dataset.from_list([EMPTY, EMPTY]), 3, 6)
    with pytest.raises(ValueError, match="no rows"):
        check_rows([])


def test_statistics() -> None:
    expected = {"align_ratio": 1 / 3, "span_tokens": 1.5, "source_span_tokens": 1.0}
    assert alignment_statistics([FULL, EMPTY]) == alignment_statistics(Dataset.from_list([FULL, EMPTY])) == expected
    assert set(alignment_statistics([EMPTY]).values()) == {0.0}
