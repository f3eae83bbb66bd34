"""The student's token that looks most like each of the source's, by edit distance (MinED)."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from cbd_hf.tokenization.pieces import Pieces
from cbd_hf.tokenization.vocabulary import VocabularyMap


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TOKEN = -1
_PAIRS_AT_ONCE = 1 << 24  # distances held at a time, of two bytes each


def nearest_student_ids(
    student: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase, vocabulary: VocabularyMap | None = None
) -> np.ndarray:
    """
    Map every token of the source to one of the student's.

    Shared tokens go to their counterparts. Every other one goes to the token of least edit distance among those with
    the same first character behind leading spaces; of equals to the lowest id.

    Args:
        student (`PreTrainedTokenizerBase`): the student's.
        source (`PreTrainedTokenizerBase`): the source's.
        vocabulary ([`VocabularyMap`], *optional*): of these two; made if not given.

    Returns:
        `np.ndarray`: int64, shape (largest id of the source + 1,); -1 for special tokens that are not shared, for
        parts of characters, and where no candidate begins alike.

    Raises:
        ImportError: rapidfuzz is not installed.
        ValueError: the tokenizers share no token.
    """
    try:
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist
    except ImportError as error:
        raise ImportError("Edit distances need rapidfuzz. Run: pip install rapidfuzz") from error

    vocabulary = vocabulary or VocabularyMap.from_tokenizers(student, source)
    pieces = Pieces.from_tokenizer(source)
    nearest = np.full(len(pieces.table), NO_TOKEN, dtype=np.int64)
    nearest[vocabulary.source_ids] = vocabulary.student_ids
    candidates = _by_first_character(Pieces.from_tokenizer(student))
    for first, tokens in _by_first_character(pieces, wanted=nearest == NO_TOKEN).items():
        if first not in candidates:
            continue
        ids, texts = np.array([*candidates[first]]), [*candidates[first].values()]
        rows = max(1, _PAIRS_AT_ONCE // len(ids))
        own, own_texts = [*tokens], [*tokens.values()]
        for start in range(0, len(own), rows):
            part = own_texts[start : start + rows]
            distances = cdist(part, texts, scorer=Levenshtein.distance, dtype=np.uint16, workers=1)
            nearest[own[start : start + rows]] = ids[distances.argmin(axis=1)]
    return nearest


def _by_first_character(pieces: Pieces, wanted: np.ndarray | None = None) -> dict[str, dict[int, str]]:
    """Texts of tokens by id, increasing, under their first character that is no space; all-space tokens under ""."""
    chosen = (pieces.lengths > 0) & ~pieces.special
    groups: dict[str, dict[int, str]] = defaultdict(dict)
    for token in np.flatnonzero(chosen if wanted is None else chosen & wanted).tolist():
        try:
            text = pieces.table[token].decode()
        except UnicodeDecodeError:
            continue
        groups[text.lstrip(" ")[:1]][token] = text
    return groups


__all__ = ["NO_TOKEN", "nearest_student_ids"]
