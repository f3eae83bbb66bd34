"""Tokens together with the bytes that they cover."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbd_hf.tokenization.alignment import align
from cbd_hf.tokenization.encoding import ByteEncoder, Encoded, from_offsets, locate
from tests.tokenization.texts import TEXTS
from tests.tokenization.tokenizers import BUILDERS, END, LOSSLESS, SlowPieces, build


NAMES = sorted(BUILDERS)
FAST = sorted(set(BUILDERS) - {"slow_bytes"})


@pytest.fixture(scope="module")
def encoders() -> dict[str, ByteEncoder]:
    return {name: ByteEncoder(build(name)) for name in BUILDERS}


def bounds(encoded: Encoded) -> list[tuple[int, int]]:
    return list(zip(encoded.starts.tolist(), encoded.ends.tolist(), strict=True))


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=3), special_tokens=st.booleans())
def test_any_text(encoders: dict[str, ByteEncoder], texts: list[str], special_tokens: bool) -> None:
    for name, encoder in encoders.items():
        rows = encoder.encode(texts, special_tokens=special_tokens)
        assert len(rows) == len(texts)
        for text, row in zip(texts, rows, strict=True):
            expected = encoder.tokenizer(text, add_special_tokens=False, split_special_tokens=not special_tokens)
            assert row.ids.tolist() == expected["input_ids"], name
            assert row.ids.dtype == row.starts.dtype == row.ends.dtype == np.int64
            assert (
                (row.starts <= row.ends).all() and (np.diff(row.starts) >= 0).all() and (np.diff(row.ends) >= 0).all()
            )
            assert (row.starts >= 0).all() and (row.ends <= len(text.encode())).all()


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_bytes_of_tokens(encoders: dict[str, ByteEncoder], text: str) -> None:
    """Where a tokenizer loses nothing, the bytes that a token covers are those it stands for."""
    raw = text.encode()
    for name in LOSSLESS:
        encoder = encoders[name]
        row = encoder.encode([text], special_tokens=False)[0]
        joined = encoder.pieces.join(row.ids.tolist())
        if joined not in (raw, b" " + raw):  # a low line in the text, which a space becomes too
            assert "\u2581" in text, name
            continue
        assert [raw[start:end] for start, end in bounds(row)[1:]] == [
            encoder.pieces.table[i] for i in row.ids.tolist()[1:]
        ]
        assert not len(row.ids) or (row.starts[0] == 0 and row.ends[-1] == len(raw))


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_bytes_through_normalisation(encoders: dict[str, ByteEncoder], text: str) -> None:
    """A span's bytes, normalised, are what its tokens stand for, up to spaces."""
    exact = encoders["byte_level"].encode([text], special_tokens=False)[0]
    for name in FAST:
        encoder = encoders[name]
        row = encoder.encode([text], special_tokens=False)[0]
        if not len(row.ids):
            continue
        normalizer = encoder.tokenizer.backend_tokenizer.normalizer
        for span in range(int((spans := align(exact, row))[0].max(initial=-1)) + 1):
            ids = row.ids[spans[1] == span].tolist()
            if encoder.tokenizer.unk_token_id in ids:
                continue
            covered = text.encode()[exact.starts[spans[0] == span][0] : exact.ends[spans[0] == span][-1]]
            joined = encoder.pieces.join(ids)
            try:
                covered_text = covered.decode()
            except UnicodeDecodeError:
                assert covered == joined.removeprefix(b" "), name
                continue
            normal = normalizer.normalize_str(covered_text) if normalizer else covered_text
            assert without_spaces(normal) == without_spaces(joined.decode()), name


def without_spaces(text: str) -> str:
    return "".join(text.replace("\u2581", " ").split())


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_single_texts(name: str) -> None:
    encoder = ByteEncoder(build(name))
    texts = ["The cat sat.", "", "caf\u00e9 e\u0301 \u2581", "   ", "\U0001f600", f"on{END}the mat"]
    together = encoder.encode(texts)
    for text, row in zip(texts, together, strict=True):
        alone = encoder.encode([text])[0]
        assert row.ids.tolist() == alone.ids.tolist() and bounds(row) == bounds(alone)
    assert encoder.encode([]) == []


@pytest.mark.parametrize("name", NAMES)
def test_other_processes(name: str) -> None:
    encoder = ByteEncoder(build(name))
    copy = pickle.loads(pickle.dumps(encoder))
    rows = encoder.encode(["The cat sat.", "caf\u00e9"]), copy.encode(["The cat sat.", "caf\u00e9"])
    for one, other in zip(*rows, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and bounds(one) == bounds(other)


@pytest.mark.parametrize("name", sorted(FAST))
def test_special_tokens(name: str) -> None:
    encoder = ByteEncoder(build(name))
    end = encoder.tokenizer.eos_token_id
    text = f"the cat{END} sat"
    as_token, as_text = (encoder.encode([text], special_tokens=choice)[0] for choice in (True, False))
    where = as_token.ids.tolist().index(end)
    assert bounds(as_token)[where] == (7, 7 + len(END))
    assert end not in as_text.ids
    assert as_text.ends[-1] == len(text)


def test_settings_stay() -> None:
    tokenizer = pickle.loads(pickle.dumps(build("byte_level")))
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(2, stride=1, direction="left")
    backend.enable_padding(length=5, pad_id=3, pad_token="x")
    backend.encode_special_tokens = True
    before = backend.to_str()
    for text in ("The cat sat on the mat.", "\udcff"):
        try:
            rows = ByteEncoder(tokenizer).encode([text, "a"])
        except ValueError:
            assert text == "\udcff"
        else:
            assert (rows[0].starts[0], rows[0].ends[-1]) == (0, len(text)) and len(rows[1].ids) == 1
    assert backend.to_str() == before and backend.encode_special_tokens


def test_prefix() -> None:
    encoder = ByteEncoder(build("byte_fallback_prefix"))
    row = encoder.encode(["\u9f8d"])[0]
    # A lone prefix covers nothing; every byte is a token of its own.
    assert bounds(row) == [(0, 0), (0, 1), (1, 2), (2, 3)]
    assert bounds(encoder.encode(["the"])[0])[-1][1] == 3
    # The tokenizer puts another prefix behind the special token; offsets place what follows.
    row = encoder.encode([f"the{END}the"])[0]
    assert row.starts[row.ids.tolist().index(encoder.tokenizer.eos_token_id)] == 3
    assert row.ends[-1] == 6 + len(END)


def test_normalised_text() -> None:
    # Composed: "e" and the accent behind it are one character to the tokenizer, and cannot be cut.
    encoder = ByteEncoder(build("byte_level_nfc"))
    text = "cafe\u0301!"
    row = encoder.encode([text])[0]
    assert encoder.pieces.join(row.ids.tolist()) == "caf\u00e9!".encode()
    assert 4 not in [
        cut for end, start in zip(row.ends, row.starts[1:], strict=False) for cut in range(end, start + 1)
    ]
    assert (row.ends[-2], row.starts[-1], row.ends[-1]) == (6, 6, 7)
    # Dropped spaces lie between tokens, stripped accents within one.
    row = ByteEncoder(build("word_piece")).encode(["The  caf\u00e9."])[0]
    assert row.ends[-1] == len("The  caf\u00e9.".encode()) and row.starts[-1] == row.ends[-2] == 10
    gaps = [
        (end, start) for end, start in zip(row.ends.tolist(), row.starts[1:].tolist(), strict=False) if start > end
    ]
    assert gaps == [(3, 5)]


def test_from_offsets() -> None:
    # "é" of two bytes whose tokens share it, a space dropped, and a token without characters that claims to be at 0.
    row = from_offsets([7, 8, 9, 5, 6], [(0, 1), (0, 1), (2, 4), (0, 0), (4, 5)], "\u00e9 ab\U0001f600")
    assert row.ids.tolist() == [7, 8, 9, 5, 6]
    assert bounds(row) == [(0, 2), (0, 2), (3, 5), (5, 5), (5, 9)]
    # Reordered marks: nothing lies between tokens that cross.
    assert bounds(from_offsets([1, 2, 3], [(0, 1), (2, 3), (1, 2)], "abc")) == [(0, 1), (1, 3), (1, 3)]
    # Marks that a normaliser may have reordered stay with what they are on.
    assert bounds(from_offsets([1, 2, 3], [(0, 1), (1, 3), (3, 4)], "u\u0300\u0323x")) == [(0, 5), (1, 5), (5, 6)]
    assert bounds(from_offsets([], [], "")) == []


def test_locate() -> None:
    def found(pieces: list[bytes], text: bytes) -> list[tuple[int, int]] | None:
        places = locate(pieces, text)
        return places and list(zip(*(side.tolist() for side in places), strict=True))

    assert found([b" a", b" b", b" ."], b"a \t b.\n ") == [(0, 1), (3, 5), (5, 6)]
    assert found([b"a", b" ", b"b"], b"a\tb") == [(0, 1), (1, 1), (2, 3)]
    assert found([b"a", b"", b"b"], b"ab") == [(0, 1), (1, 1), (1, 2)]
    assert found([], "\u3000 ".encode()) == []
    assert found([b"a", b"b"], "a\u00a0b".encode()) == [(0, 1), (3, 4)]
    assert found([b"a"], b"ab") is None
    assert found([b"a", b"c"], b"ab") is None
    assert found([b"a", b"b"], b"a") is None


def test_slow_tokenizer_without_offsets() -> None:
    encoder = ByteEncoder(SlowPieces())
    row = encoder.encode(["and the cat sat"])[0]
    assert bounds(row)[:5] == [(0, 1), (1, 2), (2, 3), (3, 7), (7, 8)]
    with pytest.raises(ValueError, match=r"SlowPieces.*no offsets.*'caf\u00e9'.*fast version"):
        encoder.encode(["cat", "caf\u00e9"])
    with pytest.raises(ValueError, match=r"SlowPieces.*cannot be aligned.*no offsets.*use_fast=True"):
        ByteEncoder(SlowPieces(change=str.upper))


@pytest.mark.parametrize("name", ["byte_level", "slow_bytes"])
def test_invalid_unicode(name: str) -> None:
    with pytest.raises(ValueError, match=r"'bad .*' is not valid Unicode"):
        ByteEncoder(build(name)).encode(["good", "bad \udcff"])
