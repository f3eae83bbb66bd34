"""The bytes of tokens, for every way of writing them."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from cbd_hf.tokenization.pieces import Pieces, prefix_length
from tests.tokenization.tokenizers import BUILDERS, END, SlowPieces, build, byte_fallback


KIND = {
    "byte_level": "byte_level",
    "byte_level_nfc": "byte_level",
    "byte_level_prefix": "byte_level",
    "byte_fallback_prefix": "low_line",
    "byte_fallback": "low_line",
    "metaspace": "low_line",
    "unigram": "low_line",
    "word_piece": "word_piece",
    "slow_bytes": "latin_1",
}


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_kind(name: str) -> None:
    pieces = Pieces.from_tokenizer(build(name))
    assert (pieces.kind, pieces.proven) == (KIND[name], True)
    assert pieces.lengths.tolist() == [len(piece) for piece in pieces.table]
    assert len(pieces.table) == max(build(name).get_vocab().values()) + 1


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"slow_bytes"}))
def test_words(name: str) -> None:
    tokenizer = build(name)
    pieces = Pieces.from_tokenizer(tokenizer)
    ids = tokenizer("the mat", add_special_tokens=False)["input_ids"]
    assert pieces.join(ids).removeprefix(b" ") == b"the mat"
    assert pieces.table[tokenizer.eos_token_id] == END.encode()
    assert pieces.special[tokenizer.eos_token_id] and not pieces.special[ids].any()


def test_every_byte() -> None:
    pieces = Pieces.from_tokenizer(build("byte_level"))
    assert {bytes([byte]) for byte in range(256)} <= set(pieces.table)
    pieces = Pieces.from_tokenizer(build("byte_fallback"))
    assert [pieces.table[i] for i in pieces.fallback.nonzero()[0]] == [bytes([byte]) for byte in range(256)]
    pieces = Pieces.from_tokenizer(build("slow_bytes"))
    assert {bytes([byte]) for byte in range(256)} <= set(pieces.table)
    assert not pieces.fallback.any()


def test_added_tokens() -> None:
    """Their text, which is not written in the alphabet of the others."""
    tokenizer = build("byte_level_prefix")
    pieces = Pieces.from_tokenizer(tokenizer)
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    assert pieces.table[tool] == b"<tool>" and not pieces.special[tool]
    # Gemma adds pieces that are also in the vocabulary: a low line in them is a space all the same.
    tokenizer = byte_fallback()
    tokenizer.add_tokens([AddedToken("\u2581the", special=False)])
    pieces = Pieces.from_tokenizer(tokenizer)
    assert pieces.table[tokenizer.convert_tokens_to_ids("\u2581the")] == b" the"


def test_a_vocabulary_of_bytes() -> None:
    """As tokenizers converted from tiktoken keep it."""

    class Ranks(SlowPieces):
        def get_vocab(self) -> dict:
            return {key.encode(): value for key, value in self.vocabulary.items()}

    pieces = Pieces.from_tokenizer(Ranks())
    assert pieces.proven and {b"c", b" and"} <= set(pieces.table)


def test_unproven() -> None:
    assert not Pieces.from_tokenizer(SlowPieces(change=str.upper)).proven


def test_prefix_length() -> None:
    assert prefix_length(b"ab", b"ab") == 0
    assert prefix_length(b" ab", b"ab") == 1
    assert prefix_length(b"  ab", b" ab") == 1
    assert prefix_length(b"", b"") == 0
    assert prefix_length(b" ", b"") == 1
    assert prefix_length(b"xab", b"ab") is None
    assert prefix_length(b" aa", b"ab") is None
    assert prefix_length(b"a", b"ab") is None
