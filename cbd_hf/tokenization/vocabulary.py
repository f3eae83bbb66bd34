"""Which tokens two vocabularies share, and which shared token every other one begins with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cbd_hf.tokenization.encoding import ByteEncoder
from cbd_hf.tokenization.pieces import Pieces


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_GROUP = -1
_WHITE_SPACE = {b" ", b"\t", b"\n", b"\r"}


@dataclass(frozen=True)
class VocabularyMap:
    """
    The tokens that two tokenizers share, one to one, and a group for every other token.

    Tokens of ordinary text are shared if they stand for the same bytes, however a tokenizer writes them (`Ġthe`,
    `▁the`). Special tokens are shared if they have the same role (end and beginning of text) or the same content, or
    are named as a pair.

    Args:
        student_ids (`np.ndarray`): shared tokens, increasing, int64, shape (shared,).
        source_ids (`np.ndarray`): their counterparts, int64, shape (shared,).
        student_groups (`np.ndarray`): for each of the student's tokens the index of the shared token that its text
            begins with, int64, shape (largest id + 1,); -1 where there is none.
        source_groups (`np.ndarray`): the same for the source's.
    """

    student_ids: np.ndarray
    source_ids: np.ndarray
    student_groups: np.ndarray
    source_groups: np.ndarray

    def coverage(self) -> dict[str, float]:
        """The share of each tokenizer's tokens that are shared: keys `"student"` and `"source"`."""
        return {
            "student": len(self.student_ids) / len(self.student_groups),
            "source": len(self.source_ids) / len(self.source_groups),
        }

    def text_coverage(self, student_ids: Sequence[int], source_ids: Sequence[int]) -> dict[str, float]:
        """
        The share of the tokens of a tokenized text that are shared: keys `"student"` and `"source"`.

        Args:
            student_ids (`Sequence[int]`): the text in the student's tokens.
            source_ids (`Sequence[int]`): the text in the source's.
        """
        return {
            "student": float(np.isin(np.asarray(student_ids), self.student_ids).mean()) if len(student_ids) else 0.0,
            "source": float(np.isin(np.asarray(source_ids), self.source_ids).mean()) if len(source_ids) else 0.0,
        }

    @classmethod
    def from_tokenizers(
        cls,
        student: PreTrainedTokenizerBase,
        source: PreTrainedTokenizerBase,
        pairs: Iterable[tuple[int, int]] = (),
    ) -> VocabularyMap:
        """
        The map between two tokenizers.

        A token that is not shared gets the group of the first token that the other tokenizer cuts its text into. If
        that one is not shared, or not the beginning of the text, it is the longest shared token that is.

        Args:
            student (`PreTrainedTokenizerBase`): the student's.
            source (`PreTrainedTokenizerBase`): the source's.
            pairs (`Iterable[tuple[int, int]]`, *optional*): further (student id, source id), such as markers of a
                turn's end. They come before what is found.

        Raises:
            ValueError: nothing is shared, a pair is outside a vocabulary or names a token twice, or a tokenizer is
                one that [`ByteEncoder`] does not take.
        """
        encoders = ByteEncoder(student), ByteEncoder(source)
        pieces = encoders[0].pieces, encoders[1].pieces
        named = _checked(pairs, len(pieces[0].table), len(pieces[1].table))
        texts = _text_tokens(pieces[0]), _text_tokens(pieces[1])
        by_text = [(token, texts[1][text]) for text, token in texts[0].items() if text in texts[1]]
        if not by_text and not named:
            raise ValueError(
                f"The tokenizers {student.name_or_path!r} and {source.name_or_path!r} share no token: nothing can be "
                "matched by vocabulary. Choose another source, or name counterparts with pairs."
            )
        shared = dict(sorted(_one_to_one([*named, *_same_role(student, source, pieces), *by_text]).items()))
        student_ids = np.fromiter(shared.keys(), dtype=np.int64, count=len(shared))
        source_ids = np.fromiter(shared.values(), dtype=np.int64, count=len(shared))
        return cls(
            student_ids,
            source_ids,
            _groups(student_ids, pieces[0], source_ids, encoders[1]),
            _groups(source_ids, pieces[1], student_ids, encoders[0]),
        )


def begin_anew(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """
    The tokens in front of which a word surely ends: those that begin with white space, and special ones.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): fast or slow.

    Returns:
        `np.ndarray`: bool, shape (largest id + 1,).

    Raises:
        ValueError: the tokenizer keeps no white space.
    """
    pieces = Pieces.from_tokenizer(tokenizer)
    starts = np.fromiter((text[:1] in _WHITE_SPACE for text in pieces.table), dtype=bool, count=len(pieces.table))
    if pieces.kind == "word_piece" or not starts.any():
        raise ValueError(
            f"No token of the tokenizer {tokenizer.name_or_path!r} begins with white space, so nothing tells where a "
            "word ends: set alm_debias=False."
        )
    return starts | pieces.special


def _checked(pairs: Iterable[tuple[int, int]], student_rows: int, source_rows: int) -> list[tuple[int, int]]:
    pairs = [(int(student), int(source)) for student, source in pairs]
    for position, (name, rows) in enumerate((("student", student_rows), ("source", source_rows))):
        ids = [pair[position] for pair in pairs]
        for token in ids:
            if not 0 <= token < rows:
                raise ValueError(f"pairs names the {name}'s token {token}, outside its vocabulary of {rows}.")
            if ids.count(token) > 1:
                raise ValueError(f"pairs names the {name}'s token {token} more than once.")
    return pairs


def _text_tokens(pieces: Pieces) -> dict[bytes, int]:
    """The token of every text that one token stands for. Byte-fallback tokens come last, else the lowest id is it."""
    tokens: dict[bytes, int] = {}
    of_text = (pieces.lengths > 0) & ~pieces.special
    for chosen in (of_text & ~pieces.fallback, of_text & pieces.fallback):
        for token in np.flatnonzero(chosen).tolist():
            tokens.setdefault(pieces.table[token], token)
    return tokens


def _same_role(
    student: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase, pieces: tuple[Pieces, Pieces]
) -> list[tuple[int, int]]:
    """Special tokens that end or begin a text, and those of the same content."""
    pairs = [(student.eos_token_id, source.eos_token_id), (student.bos_token_id, source.bos_token_id)]
    sides = []
    for tokenizer, side in zip((student, source), pieces, strict=True):
        # What is unknown or padding has no meaning that the other side could share.
        without = {tokenizer.unk_token_id, tokenizer.pad_token_id}
        special = np.flatnonzero(side.special).tolist()
        sides.append({side.table[token]: token for token in special if token not in without})
    pairs += [(token, sides[1][content]) for content, token in sides[0].items() if content in sides[1]]
    return [(first, second) for first, second in pairs if first is not None and second is not None]


def _one_to_one(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The pairs without those that name a token again."""
    kept: dict[int, int] = {}
    taken: set[int] = set()
    for first, second in pairs:
        if first not in kept and second not in taken:
            kept[first] = second
            taken.add(second)
    return kept


def _groups(ids: np.ndarray, pieces: Pieces, other_ids: np.ndarray, other: ByteEncoder) -> np.ndarray:
    """Groups of one side's tokens; `ids` and `other_ids` are the shared ones."""
    groups = np.full(len(pieces.table), NO_GROUP, dtype=np.int64)
    groups[ids] = np.arange(len(ids))
    rest = np.flatnonzero((groups == NO_GROUP) & ~pieces.special & (pieces.lengths > 0)).tolist()
    first = _first_tokens([pieces.table[token] for token in rest], other)
    by_other = np.full(len(other.pieces.table), NO_GROUP, dtype=np.int64)
    by_other[other_ids] = np.arange(len(other_ids))
    by_text = {pieces.table[token]: group for group, token in enumerate(ids.tolist()) if not pieces.special[token]}
    for token, start in zip(rest, first, strict=True):
        text = pieces.table[token]
        if start is not None and by_other[start] != NO_GROUP:
            piece = other.pieces.table[start]
            if len(piece) < len(text) and text.startswith(piece):
                groups[token] = by_other[start]
                continue
        for length in range(len(text) - 1, 0, -1):
            if (group := by_text.get(text[:length])) is not None:
                groups[token] = group
                break
    return groups


def _first_tokens(texts: list[bytes], encoder: ByteEncoder) -> list[int | None]:
    """The first token of each text; `None` where the bytes are not text by themselves, or have no token."""
    result: list[int | None] = [None] * len(texts)
    readable: dict[int, str] = {}
    for index, text in enumerate(texts):
        try:
            readable[index] = text.decode()
        except UnicodeDecodeError:
            continue
    for index, ids in zip(readable, encoder.ids([*readable.values()], special_tokens=False), strict=True):
        result[index] = ids[0] if ids else None
    return result


__all__ = ["NO_GROUP", "VocabularyMap", "begin_anew"]
