"""Aligning two tokenizations of one text: minimal spans of tokens that cover the same bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from cbd_hf.tokenization.encoding import Encoded

NO_SPAN = -1


def align(first: Encoded, second: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """
    Number the spans of two tokenizations of the same text.

    A span ends where both sides can be cut. A token that covers no byte belongs to the span behind it, at the end to
    the last one.

    Args:
        first ([`Encoded`]): one side.
        second ([`Encoded`]): the other.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the span of each token, int64, shapes (tokens of the first,) and (tokens of
        the second,). Spans are numbered from 0 in the order of the text, and each has tokens of both sides. If one
        side has no token at all (it drops whitespace and the text is nothing else), the other's are -1.
    """
    if not len(first.ids) or not len(second.ids):
        return np.full(len(first.ids), NO_SPAN), np.full(len(second.ids), NO_SPAN)
    sides = _cuts(first), _cuts(second)
    (tokens_first, low_first, high_first), (tokens_second, low_second, high_second) = sides
    if high_first is low_first and high_second is low_second:  # single bytes on both sides
        in_first, in_second = _common(low_first, low_second)
    else:
        in_first, in_second = _matching(low_first, high_first, low_second, high_second)
    return (
        _numbers(tokens_first[in_first], len(first.ids)),
        _numbers(tokens_second[in_second], len(second.ids)),
    )


def _cuts(encoded: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens behind which the text can be cut, and the least and the greatest byte of each cut."""
    starts, ends = encoded.starts, encoded.ends
    covering = np.flatnonzero(ends > starts)
    if len(covering) < len(starts):
        starts, ends = starts[covering], ends[covering]
    low, high = ends[:-1], starts[1:]
    if np.array_equal(low, high):
        return covering[:-1], low, low
    allowed = low <= high
    return covering[:-1][allowed], low[allowed], high[allowed]


def _common(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the values that two increasing arrays share."""
    if not len(first) or not len(second):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    where = np.searchsorted(second, first)
    found = second[np.minimum(where, len(second) - 1)] == first
    return np.flatnonzero(found), where[found]


def _matching(
    low_first: np.ndarray, high_first: np.ndarray, low_second: np.ndarray, high_second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of as many pairs of overlapping intervals as possible, each used once; both increasing and disjoint."""
    if not len(low_first) or not len(low_second):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    where = np.searchsorted(high_second, low_first)  # the first that does not lie before it
    last = len(low_second) - 1
    found = (where <= last) & (low_second[np.minimum(where, last)] <= high_first)
    in_first, in_second = np.flatnonzero(found), where[found]
    if (np.diff(in_second) > 0).all():
        return in_first, in_second
    return _matching_in_turn(low_first, high_first, low_second, high_second)


def _matching_in_turn(
    low_first: np.ndarray, high_first: np.ndarray, low_second: np.ndarray, high_second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[`_matching`] where an interval overlaps several of the other side."""
    first = list(zip(low_first.tolist(), high_first.tolist(), strict=True))
    second = list(zip(low_second.tolist(), high_second.tolist(), strict=True))
    in_first, in_second = [], []
    i = j = 0
    while i < len(first) and j < len(second):
        if first[i][1] < second[j][0]:
            i += 1
        elif second[j][1] < first[i][0]:
            j += 1
        else:
            in_first.append(i)
            in_second.append(j)
            i, j = i + 1, j + 1
    return np.array(in_first, dtype=np.int64), np.array(in_second, dtype=np.int64)


def _numbers(last_tokens: np.ndarray, tokens: int) -> np.ndarray:
    """The span of each token, from the last token of every span but the last."""
    starts = np.zeros(tokens + 1, dtype=np.int64)
    starts[last_tokens + 1] = 1
    return starts[:tokens].cumsum()


__all__ = ["NO_SPAN", "align"]
