"""One row as two models read it: which tokens are supervised, and which spans of tokens cover the same bytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cbd_hf.data.columns import IGNORED
from cbd_hf.tokenization.alignment import NO_SPAN, align
from cbd_hf.tokenization.encoding import Encoded


COLUMNS = ("input_ids", "labels", "spans", "source_input_ids", "source_labels", "source_spans")
BEHIND = 1 << 62  # a byte behind the end of every text


@dataclass(frozen=True)
class Reading:
    """
    A row's text for one model, before it is tokenized.

    Both models' readings of a row have the same passages; positions are bytes of the text (UTF-8).

    Args:
        text (`str`): what the model reads.
        passages (`np.ndarray`): int64 (passages, 2), first byte of each passage that both models read, and the byte
            behind its last.
        trimmed (`np.ndarray`): int64 (passages, 2), bytes of white space that this text leaves out at the passage's
            start and at its end.
        aligned (`np.ndarray`): bool (passages,), whether the passage may be aligned. Those that may are in order.
        closed (`np.ndarray`): bool (passages,), whether the token behind the passage ends an answer.
        supervised (`np.ndarray`): int64 (ranges, 2), in order and apart: a token is supervised if it starts in one.
        plain (`bool`): BOS and EOS are put around the text; a chat template brings its own.
    """

    text: str
    passages: np.ndarray
    trimmed: np.ndarray
    aligned: np.ndarray
    closed: np.ndarray
    supervised: np.ndarray
    plain: bool


@dataclass(frozen=True)
class SpecialIds:
    """
    The special tokens of one tokenizer.

    Args:
        bos (`int`, *optional*): if the tokenizer itself puts it in front of texts.
        eos (`int`, *optional*): end of a text.
        added (`np.ndarray`): int64, sorted, ids of all special and added tokens.
    """

    bos: int | None
    eos: int | None
    added: np.ndarray


@dataclass(frozen=True)
class Tokens:
    """
    A [`Reading`], tokenized.

    Args:
        ids, starts, ends (`np.ndarray`): int64 (n,), as in [`Encoded`], BOS and EOS included.
        supervised (`np.ndarray`): bool (n,).
        closing (`np.ndarray`): int64 (passages,), the token that ends the answer in this passage, -1 if none does.
        reading ([`Reading`]): where they come from.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    supervised: np.ndarray
    closing: np.ndarray
    reading: Reading


def plain_reading(*passages: str, supervised_from: int = 0) -> Reading:
    """
    A text without a chat template.

    Args:
        passages (`str`): its parts, one behind the other; the last one is closed by EOS.
        supervised_from (`int`, *optional*, defaults to 0): the first supervised byte.
    """
    bounds = np.cumsum([0, *(len(passage.encode()) for passage in passages)])
    count = len(passages)
    return Reading(
        text="".join(passages),
        passages=np.stack((bounds[:-1], bounds[1:]), axis=1),
        trimmed=np.zeros((count, 2), np.int64),
        aligned=np.ones(count, bool),
        closed=np.arange(count) == count - 1,
        supervised=np.array([[supervised_from, BEHIND]]),
        plain=True,
    )


def tokens_of(reading: Reading, encoded: Encoded, special: SpecialIds) -> Tokens:
    """The tokens of a reading's text, with BOS and EOS around a plain one where the model has them."""
    ids, starts, ends = encoded.ids, encoded.starts, encoded.ends
    behind = reading.passages[:, 1]
    closing = np.full(len(behind), -1)
    if reading.plain:
        # BOS lies before the first byte and EOS behind the last, outside of every passage.
        front, back = ([] if token is None else [token] for token in (special.bos, special.eos))
        size = int(behind[-1])
        ids = np.concatenate((front, ids, back)).astype(np.int64)
        starts = np.concatenate(([-1] * len(front), starts, [size] * len(back))).astype(np.int64)
        ends = np.concatenate(([-1] * len(front), ends, [size] * len(back))).astype(np.int64)
        if back:
            closing[reading.closed] = len(ids) - 1
    elif len(ids):
        following = np.searchsorted(starts, behind)
        there = np.minimum(following, len(ids) - 1)
        ends_turn = reading.closed & (following < len(ids)) & (starts[there] == behind)
        nearest = np.searchsorted(special.added, ids[there])  # np.isin would sort all added tokens for every row
        ends_turn &= np.append(special.added, -1)[nearest] == ids[there]
        closing[ends_turn] = following[ends_turn]
    supervised = np.searchsorted(reading.supervised.reshape(-1), starts, side="right") % 2 == 1
    supervised[closing[closing >= 0]] = True
    return Tokens(ids, starts, ends, supervised, closing, reading)


def joined(
    student: Tokens, source: Tokens, max_length: int | None = None, source_max_length: int | None = None
) -> dict[str, np.ndarray]:
    """
    One prepared row.

    A row that is too long on either side ends on both behind the last span that fits on both. If no supervised one
    is left, both sides are cut to their limits, and nothing is supervised.

    Args:
        student, source ([`Tokens`]): of the same row.
        max_length, source_max_length (`int`, *optional*): most tokens of a side.

    Returns:
        `dict[str, np.ndarray]`: the arrays of `COLUMNS`, int64 (tokens of the side,). `labels` are -100 where nothing
        is supervised. `spans` are numbered from 0, the same on both sides; -1 is for tokens outside of the common
        passages, or over their edge, and for spans that are not supervised throughout or hold a row's first token.
    """
    limits = (max_length or BEHIND, source_max_length or BEHIND)
    sides = (student, source)
    indices, spans, whole = _spans(student, source)
    lengths = [len(side.ids) for side in sides]
    long = any(length > limit for length, limit in zip(lengths, limits, strict=True))
    if long:
        # Token behind each span, on both sides.
        counts = [np.searchsorted(number, np.arange(len(whole)), side="right") for number in spans]
        stops = [index[count - 1] + 1 for index, count in zip(indices, counts, strict=True)]
        fitting = np.flatnonzero(whole & (stops[0] <= limits[0]) & (stops[1] <= limits[1]))
        lengths = [int(stop[fitting[-1]]) if len(fitting) else 0 for stop in stops]
    numbered = whole
    for side, index, number, length in zip(sides, indices, spans, lengths, strict=True):
        numbered[number[~side.supervised[index] | (index == 0) | (index >= length)]] = False
    useless = long and not numbered.any()
    if useless:
        lengths = [min(len(side.ids), limit) for side, limit in zip(sides, limits, strict=True)]
    numbers = np.where(numbered, np.cumsum(numbered) - 1, NO_SPAN)
    row = []
    for side, index, number, length in zip(sides, indices, spans, lengths, strict=True):
        named = np.full(len(side.ids), NO_SPAN)
        named[index] = numbers[number]
        labels = np.full(len(side.ids), IGNORED) if useless else np.where(side.supervised, side.ids, IGNORED)
        row += [side.ids[:length], labels[:length], named[:length]]
    return dict(zip(COLUMNS, row, strict=True))


def _spans(student: Tokens, source: Tokens) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """
    Spans over the passages that both read, and over the ends of answers.

    Returns:
        `tuple`: of each side the tokens that have a span, ascending; the numbers of their spans; and bool (spans,),
        whether all its tokens lie within a passage.
    """
    sides = (student, source)
    nothing = [np.zeros(0, np.int64)] * 2
    aligned = student.reading.aligned & source.reading.aligned
    trimmed = np.maximum(student.reading.trimmed, source.reading.trimmed)
    closed = ((student.closing >= 0) & (source.closing >= 0))[aligned]
    # All passages one behind the other are the common text. Each end of an answer is one byte of it.
    regions = [(side.reading.passages + (trimmed - side.reading.trimmed) * [1, -1])[aligned] for side in sides]
    sizes = np.maximum(regions[0][:, 1] - regions[0][:, 0], 0)
    offsets = np.cumsum(sizes + closed) - sizes - closed
    indices, texts, straddling = [], [], []
    for side, region in zip(sides, regions, strict=True):
        index, starts, ends, over = _placed(side, region[:, 0], sizes, offsets, side.closing[aligned], closed)
        indices.append(index)
        texts.append(Encoded(ids=side.ids[index], starts=starts, ends=ends))
        straddling.append(over)
    if not len(indices[0]) or not len(indices[1]):
        return nothing, nothing, np.zeros(0, bool)
    spans = list(align(*texts))
    whole = np.ones(int(spans[0][-1]) + 1, bool)
    for number, over in zip(spans, straddling, strict=True):
        whole[number[over]] = False
    return indices, spans, whole


def _placed(
    tokens: Tokens, first: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, closing: np.ndarray, closed: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    The tokens that lie in passages, in the common text.

    Args:
        tokens ([`Tokens`]): of one side.
        first, sizes, offsets (`np.ndarray`): int64 (passages,), where each passage starts in the side's text, its
            bytes, and where it starts in the common text.
        closing (`np.ndarray`): int64 (passages,), token that ends the answer.
        closed (`np.ndarray`): bool (passages,), whether it does on both sides.

    Returns:
        `tuple`: int64 (placed,) tokens, their starts and ends; bool (placed,), whether one reaches over the edge.
    """
    if not len(first):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool)
    starts, ends = tokens.starts, tokens.ends
    passage = np.searchsorted(first + sizes, starts, side="right")
    inside = passage < len(first)
    passage = np.minimum(passage, len(first) - 1)
    low, high = first[passage], (first + sizes)[passage]
    inside &= (ends > low) | (starts >= low)
    over = inside & ((starts < low) | (ends > high))
    shift = offsets[passage] - low
    placed_starts, placed_ends = np.maximum(starts, low) + shift, np.minimum(ends, high) + shift
    last = closing[closed]
    inside[last], over[last] = True, False
    placed_starts[last] = (offsets + sizes)[closed]
    placed_ends[last] = placed_starts[last] + 1
    index = np.flatnonzero(inside)
    return index, placed_starts[index], placed_ends[index], over[index]


def check_rows(
    rows: Any, max_length: int | None = None, source_max_length: int | None = None, what: str = "rows"
) -> None:
    """
    Raise if no prepared row has a numbered span; warn if some have none.

    Args:
        rows (`Dataset` or `Iterable[dict]`): as `BridgeDataCollator.encode` prepares them.
        max_length, source_max_length (`int`, *optional*): the collator's, for the message.
        what (`str`, *optional*, defaults to `"rows"`): which rows they are, for the message.

    Raises:
        ValueError: there are no rows, or none of them has a span that is supervised on both sides.
    """
    total, empty, first = 0, 0, None
    for row in _rows(rows, "labels", "spans"):
        if not (row["spans"] >= 0).any():
            empty += 1
            if first is None:
                supervised = np.flatnonzero(row["labels"] != IGNORED)
                first = (total, int(supervised[0]) if len(supervised) else len(row["labels"]))
        total += 1
    if not total:
        raise ValueError("There are no rows. Choose another split, or raise the limit on examples.")
    if first is None:
        return
    message = (
        f"{empty} of {total} {what} have no supervised token that both models read within max_length={max_length} and "
        f"source_max_length={source_max_length}; the first is row {first[0]}, whose prompt takes {first[1]} tokens "
        "of the student or more: raise max_length, or drop long prompts (cbd_hf.data.instructions.drop_long_prompts)."
    )
    if empty == total:
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def alignment_statistics(rows: Any) -> dict[str, float]:
    """
    How finely rows are aligned.

    Args:
        rows (`Dataset` or `Iterable[dict]`): as `BridgeDataCollator.encode` prepares them, or rows of a batch.

    Returns:
        `dict[str, float]`: `align_ratio`, the share of the student's supervised tokens that are alone in a span with
        one token of the source; `span_tokens` and `source_span_tokens`, mean tokens of a numbered span on each side.
        0 where there is nothing to count.
    """
    supervised = single = spans = student_tokens = source_tokens = 0
    for row in _rows(rows, "labels", "spans", "source_spans"):
        student, source = (np.bincount(row[name][row[name] >= 0]) for name in ("spans", "source_spans"))
        supervised += int((row["labels"][1:] != IGNORED).sum())
        single += int(((student == 1) & (source == 1)).sum())
        spans += len(student)
        student_tokens += int(student.sum())
        source_tokens += int(source.sum())
    return {
        "align_ratio": single / max(supervised, 1),
        "span_tokens": student_tokens / max(spans, 1),
        "source_span_tokens": source_tokens / max(spans, 1),
    }


def _rows(rows: Any, *columns: str) -> Iterator[Mapping[str, np.ndarray]]:
    """Rows with these columns as arrays; of a `Dataset` only these are read."""
    if not hasattr(rows, "select_columns"):
        for row in rows:
            yield {name: np.asarray(row[name], np.int64) for name in columns}
        return
    for table in rows.select_columns([*columns]).with_format("arrow").iter(batch_size=1000):
        arrays = []
        for name in columns:
            lists = table[name].combine_chunks()
            stops = pc.list_value_length(lists).to_numpy().cumsum()
            arrays.append(np.split(lists.flatten().to_numpy(), stops[:-1]))
        for values in zip(*arrays, strict=True):
            yield dict(zip(columns, values, strict=True))


__all__ = [
    "BEHIND",
    "COLUMNS",
    "Reading",
    "SpecialIds",
    "Tokens",
    "alignment_statistics",
    "check_rows",
    "joined",
    "plain_reading",
    "tokens_of",
]
