"""MinED's counterpart of every token of the source."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from cbd_hf.tokenization.edit_distance import NO_TOKEN, nearest_student_ids
from cbd_hf.tokenization.pieces import Pieces
from cbd_hf.tokenization.vocabulary import VocabularyMap
from tests.tokenization.tokenizers import build


def distance(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def texts(pieces: Pieces) -> dict[int, str]:
    found = {}
    for token in np.flatnonzero((pieces.lengths > 0) & ~pieces.special).tolist():
        try:
            found[token] = pieces.table[token].decode()
        except UnicodeDecodeError:
            continue
    return found


@pytest.mark.parametrize("at_once", [1 << 24, 40])
@pytest.mark.parametrize("source_name", ["byte_fallback", "word_piece", "unigram"])
def test_against_all_pairs(source_name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rapidfuzz", reason="pip install rapidfuzz")
    monkeypatch.setattr("cbd_hf.tokenization.edit_distance._PAIRS_AT_ONCE", at_once)
    student, source = build("byte_level"), build(source_name)
    vocabulary = VocabularyMap.from_tokenizers(student, source)
    nearest = nearest_student_ids(student, source)
    assert nearest.dtype == np.int64 and (nearest[vocabulary.source_ids] == vocabulary.student_ids).all()
    candidates, wanted = texts(Pieces.from_tokenizer(student)), texts(Pieces.from_tokenizer(source))
    rest = sorted(set(range(len(nearest))) - set(vocabulary.source_ids.tolist()))
    assert sum(nearest[rest] != NO_TOKEN) > 10
    for token in rest:
        expected = NO_TOKEN
        if token in wanted:
            text = wanted[token]
            alike = {i: other for i, other in candidates.items() if other.lstrip(" ")[:1] == text.lstrip(" ")[:1]}
            expected = min(alike, key=lambda i: (distance(alike[i], text), i), default=NO_TOKEN)
        assert nearest[token] == expected


def test_a_given_map() -> None:
    pytest.importorskip("rapidfuzz", reason="pip install rapidfuzz")
    student, source = build("byte_level"), build("byte_fallback")
    pair = (7, source.unk_token_id)
    vocabulary = VocabularyMap.from_tokenizers(student, source, [pair])
    assert nearest_student_ids(student, source, vocabulary)[pair[1]] == pair[0]
    assert nearest_student_ids(student, source)[pair[1]] == NO_TOKEN


def test_without_rapidfuzz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ImportError, match="pip install rapidfuzz"):
        nearest_student_ids(build("byte_level"), build("word_piece"))
