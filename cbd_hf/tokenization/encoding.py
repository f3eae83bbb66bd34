"""Tokenizing texts together with the bytes that every token covers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from cbd_hf.tokenization.pieces import Pieces, prefix_length
from cbd_hf.tokenization.tokenizing import token_ids, token_offsets


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = re.compile(b"|".join(re.escape(chr(c).encode()) for c in range(0x3001) if chr(c).isspace()))  # one, in UTF-8
_FIRST_MARK = 0x300  # of the characters that combine with the one before
_SHOWN = 60  # characters of a text in an error message


@dataclass(frozen=True)
class Encoded:
    """
    One text, tokenized.

    Between tokens i and i + 1 the text may be cut at any byte from `ends[i]` to `starts[i + 1]`; nowhere if `ends[i]`
    is the greater one: both tokens then share a character that the tokenizer does not let us divide.

    Args:
        ids (`np.ndarray`): int64, shape (tokens,).
        starts (`np.ndarray`): first byte of the text (UTF-8) that each token covers, int64, shape (tokens,).
        ends (`np.ndarray`): behind the last one, int64, shape (tokens,). Equal to `starts`: the token covers nothing.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class ByteEncoder:
    """
    Tokenizes texts and finds the bytes that each token covers.

    Tokens' own bytes are used where they give back the text but for spaces, which is checked for every text. Where
    the tokenizer changes more (normalises the text, does not know a character), its character offsets are used.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): fast, or slow with tokens that give back a text.

    Raises:
        ValueError: the tokenizer has no offsets, and its tokens do not give back a plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pieces = Pieces.from_tokenizer(tokenizer)
        if not self.pieces.proven and not tokenizer.is_fast:
            raise ValueError(
                f"{_name(tokenizer)} cannot be aligned: it has no offsets, and its tokens do not give back a plain "
                "text. Use its fast version (AutoTokenizer.from_pretrained(..., use_fast=True))."
            )

    def encode(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[Encoded]:
        """
        Tokenize texts as the tokenizer does with `add_special_tokens=False`.

        Args:
            texts (`Sequence[str]`): of any length.
            special_tokens (`bool`, *optional*, defaults to `True`): whether a special token's text becomes that
                token, as in a rendered chat template; else it is read as plain text.

        Raises:
            ValueError: a text is not valid Unicode, or it cannot be aligned because a tokenizer without offsets
                changes it.
        """
        texts = list(texts)
        encoded = [_utf8(text) for text in texts]
        if not self.pieces.proven:
            return self._with_offsets(texts, special_tokens)
        rows = self.ids(texts, special_tokens=special_tokens)
        bounds = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=bounds[1:])
        ids = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=bounds[-1])
        lengths = self.pieces.lengths[ids]
        ends = lengths.cumsum()
        starts = ends - lengths
        result: list[Encoded | None] = []
        for row, text, (first, last) in zip(rows, encoded, pairwise(bounds.tolist()), strict=True):
            prefix = prefix_length(self.pieces.join(row), text)
            if prefix is None:
                places = locate([self.pieces.table[i] for i in row], text)
            elif first == last:
                places = starts[:0], ends[:0]
            else:
                origin = starts[first] + prefix
                places = starts[first:last] - origin, ends[first:last] - origin
                if prefix:
                    places = places[0].clip(min=0), places[1].clip(min=0)
            result.append(None if places is None else Encoded(ids[first:last], *places))
        changed = [index for index, row in enumerate(result) if row is None]
        others = iter(self._with_offsets([texts[index] for index in changed], special_tokens) if changed else ())
        return [next(others) if row is None else row for row in result]

    def ids(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """The tokens alone. Arguments as in [`encode`]."""
        return token_ids(self.tokenizer, list(texts), special_tokens=special_tokens)

    def _with_offsets(self, texts: list[str], special_tokens: bool) -> list[Encoded]:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{_name(self.tokenizer)} has no offsets and changes the text {_shown(texts[0])}: its tokens do not "
                "give it back. Use its fast version, or leave out such texts."
            )
        found = token_offsets(self.tokenizer, texts, special_tokens=special_tokens)
        return [from_offsets(ids, offsets, text) for (ids, offsets), text in zip(found, texts, strict=True)]


def locate(pieces: Sequence[bytes], text: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """
    Find tokens in a text from which a tokenizer drops spaces, or into which it puts some before tokens.

    Args:
        pieces (`Sequence[bytes]`): what each token stands for.
        text (`bytes`): whose bytes they are.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: first byte of each token and the one behind its last, int64, shape (pieces,)
        each; `None` if the text differs in more than spaces.
    """
    starts, ends = [], []
    at = 0
    for piece in pieces:
        start = at
        while not text.startswith(piece, start):
            if piece[:1] == b" " and text.startswith(piece[1:], start):
                piece = piece[1:]
            elif space := _SPACE.match(text, start):
                start = space.end()
            else:
                return None
        at = start + len(piece)
        starts.append(start)
        ends.append(at)
    while at < len(text):
        if not (space := _SPACE.match(text, at)):
            return None
        at = space.end()
    return np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)


def from_offsets(ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str) -> Encoded:
    """
    An [`Encoded`] from character offsets.

    Args:
        ids (`Sequence[int]`): of the tokens.
        offsets (`Sequence[tuple[int, int]]`): first character of each token and the one behind its last. Tokens may
            share characters or leave some out. Spaces that are left out belong to either neighbour, other characters
            to the token before them.
        text (`str`): what they are offsets into.
    """
    array = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = array[:, 0], np.maximum.accumulate(array[:, 1])
    # A token without characters may say that it is anywhere: it lies where the text before it ends.
    starts = np.where(starts >= array[:, 1], ends, starts)
    starts = np.minimum.accumulate(starts[::-1])[::-1]
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    may_combine = np.append(characters >= _FIRST_MARK, False)[ends[:-1]]
    for gap in np.flatnonzero((ends[:-1] < starts[1:]) | may_combine).tolist():
        # What is dropped here and is no space was composed with the token before, or stripped from it. A normaliser
        # may also change the order of marks, of which offsets say nothing: marks are not cut off.
        end, limit = int(ends[gap]), int(starts[gap + 1])
        while end < limit and not text[end].isspace():
            end += 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        ends[gap] = end
    ends = np.maximum.accumulate(ends)
    before = np.zeros(len(text) + 1, dtype=np.int64)
    np.cumsum(1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000), out=before[1:])
    return Encoded(np.array(ids, dtype=np.int64), before[starts], before[ends])


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The text {_shown(text)} is not valid Unicode: {error}.") from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{type(tokenizer).__name__} ({tokenizer.name_or_path or 'not from a checkpoint'})"


__all__ = ["ByteEncoder", "Encoded", "from_offsets", "locate"]
