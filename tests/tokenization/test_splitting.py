"""Byte strings as the tokens of a vocabulary."""

from __future__ import annotations

import pytest

from cbd_hf.tokenization.pieces import Pieces
from cbd_hf.tokenization.splitting import split_texts

from .tokenizers import BUILDERS, LOSSLESS, build


TEXTS = [b" the", b"the", b"ing", b" of them", b"3", "ü".encode(), b"\n\n", " 你好".encode(), b"xq  z"]
BROKEN = [b"\xe2\x80", b" \xe2", b"a\xff\xfeb", b"\x80"]


@pytest.mark.parametrize("name", LOSSLESS)
def test_bytes_are_those_of_the_text(name: str) -> None:
    tokenizer = build(name)
    pieces = Pieces.from_tokenizer(tokenizer)
    texts = TEXTS if name == "slow_bytes" else TEXTS + BROKEN
    for text, split in zip(texts, split_texts(tokenizer, texts), strict=True):
        assert split is not None and pieces.join(split) == text


@pytest.mark.parametrize("name", ["byte_level", "byte_level_prefix", "byte_fallback_prefix", "byte_fallback"])
def test_every_piece_is_itself(name: str) -> None:
    """Also those inside words, before which a tokenizer may put a space."""
    tokenizer = build(name)
    pieces = Pieces.from_tokenizer(tokenizer)
    own = [i for i in range(len(pieces.table)) if pieces.table[i] and not pieces.special[i] and not pieces.fallback[i]]
    own = [i for i in own if i not in tokenizer.added_tokens_decoder]
    assert len(own) > 250
    assert split_texts(tokenizer, [pieces.table[i] for i in own]) == [[i] for i in own]


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - set(LOSSLESS)))
def test_any_kind_says_a_known_word(name: str) -> None:
    tokenizer = build(name)
    (split,) = split_texts(tokenizer, [b" the"])
    assert split is not None and Pieces.from_tokenizer(tokenizer).join(split).strip() == b"the"


def test_what_cannot_be_said() -> None:
    assert split_texts(build("word_piece"), ["日".encode(), b"\xff"]) == [None, None]
    assert split_texts(build("slow_bytes"), [b"\xff"]) == [None]
    assert split_texts(build("byte_level"), []) == []


def test_special_tokens_are_plain_text() -> None:
    tokenizer = build("byte_level")
    (split,) = split_texts(tokenizer, [tokenizer.eos_token.encode()])
    assert split is not None and tokenizer.eos_token_id not in split and len(split) > 1
