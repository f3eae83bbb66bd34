"""The bytes that each token of a vocabulary stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cbd_hf.tokenization.tokenizing import token_ids


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOW_LINE = "\u2581"  # SentencePiece's space
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_CONTINUATION = "##"  # WordPiece: a token that does not start a word

# The first has to come back whole. The others tell apart schemes that agree on it.
PROBES = (
    "the cat sat on the mat",
    "A Cat, 2 dogs; and more...",
    "runs   of    spaces\tand a tab\nand\n\nlines",
    "na\u00efve caf\u00e9 \u0161koda",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
    "\u4f60\u597d\u3001\u4e16\u754c",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f600 \U0001f469\u200d\U0001f680",
)


@dataclass(frozen=True)
class Pieces:
    """
    The bytes of a tokenizer's tokens, by id.

    Args:
        kind (`str`): a key of `KINDS`: how token strings are read.
        proven (`bool`): whether joined pieces gave back a plain text. If not, `table` is a guess.
        table (`list[bytes]`): of every id up to the largest; empty where there is no token.
        lengths (`np.ndarray`): of `table`, int64, shape (rows,).
        special (`np.ndarray`): special tokens, bool, shape (rows,). Their bytes are their content's.
        fallback (`np.ndarray`): byte-fallback tokens such as `<0xE4>`, bool, shape (rows,).
    """

    kind: str
    proven: bool
    table: list[bytes]
    lengths: np.ndarray
    special: np.ndarray
    fallback: np.ndarray

    def join(self, ids: Sequence[int]) -> bytes:
        """The bytes that a sequence of tokens stands for."""
        return b"".join(map(self.table.__getitem__, ids))

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> Pieces:
        """
        The pieces of a tokenizer's whole vocabulary.

        How token strings are to be read is found by tokenizing `PROBES`: the reading that gives most of them back.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): fast or slow.
        """
        tokens = {i: token for token, i in tokenizer.get_vocab().items()}
        added, own = tokenizer.added_tokens_decoder, _own_ids(tokenizer)
        contents = {i: token.content.encode() for i, token in added.items() if token.special or i not in own}
        probes = [(text.encode(), ids) for text, ids in zip(PROBES, token_ids(tokenizer, [*PROBES]), strict=True)]

        def piece(token_id: int, read: Callable[[str], bytes | None]) -> bytes:
            if token_id in contents:
                return contents[token_id]
            token = tokens.get(token_id, "")
            return token if isinstance(token, bytes) else read(token) or b""

        def gives_back(read: Callable[[str], bytes | None]) -> list[bool]:
            return [prefix_length(b"".join(piece(i, read) for i in ids), text) is not None for text, ids in probes]

        results = {kind: gives_back(read) for kind, read in KINDS.items()}
        # max() keeps the first of equals: the order of KINDS matters for a vocabulary of plain ASCII.
        kind = max(KINDS, key=lambda name: (results[name][0], sum(results[name])))
        rows = max(max(tokens, default=-1), max(added, default=-1)) + 1
        table = [piece(i, KINDS[kind]) for i in range(rows)]
        special, fallback = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
        special[[i for i, token in added.items() if token.special] + list(tokenizer.all_special_ids)] = True
        if kind == "low_line":
            fallback[[i for i, token in tokens.items() if _low_line_byte(token) is not None]] = True
        lengths = np.fromiter(map(len, table), dtype=np.int64, count=rows)
        return cls(kind, results[kind][0], table, lengths, special, fallback)


def prefix_length(joined: bytes, text: bytes) -> int | None:
    """Length of the prefix that a tokenizer puts before a text (0, or 1: a space); `None` if the rest differs."""
    if joined == text:
        return 0
    return 1 if len(joined) == len(text) + 1 and joined[0] == 0x20 and joined.endswith(text) else None


def _own_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the model's own vocabulary. An added token that is also there is read like the others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return frozenset() if backend is None else frozenset(backend.get_vocab(with_added_tokens=False).values())


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's alphabet: the byte that each of its 256 characters stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()
_OUTSIDE = re.compile("[^" + re.escape("".join(map(chr, _ALPHABET))) + "]")


def _byte_level(token: str) -> bytes | None:
    return None if _OUTSIDE.search(token) else token.translate(_ALPHABET).encode("latin-1")


def _low_line_byte(token: str | bytes) -> bytes | None:
    byte = _FALLBACK.fullmatch(token) if isinstance(token, str) and token.startswith("<0x") else None
    return None if byte is None else bytes([int(byte[1], 16)])


def _low_line(token: str) -> bytes | None:
    return _low_line_byte(token) or token.replace(LOW_LINE, " ").encode()


def _word_piece(token: str) -> bytes | None:
    if token.startswith(_CONTINUATION) and token != _CONTINUATION:
        return token.removeprefix(_CONTINUATION).encode()
    return b" " + token.encode()


def _latin_1(token: str) -> bytes | None:
    return token.encode("latin-1") if max(token, default="") < "\u0100" else None


def _plain(token: str) -> bytes | None:
    return token.encode()


KINDS: dict[str, Callable[[str], bytes | None]] = {
    "low_line": _low_line,  # SentencePiece's BPE and Unigram, Metaspace
    "byte_level": _byte_level,
    "word_piece": _word_piece,
    "latin_1": _latin_1,  # ByT5: a character for every byte
    "plain": _plain,
}


__all__ = ["KINDS", "LOW_LINE", "PROBES", "Pieces", "prefix_length"]
