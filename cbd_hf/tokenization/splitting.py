"""Splitting byte strings into the tokens of a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cbd_hf.tokenization.encoding import ByteEncoder
from cbd_hf.tokenization.pieces import LOW_LINE, Pieces


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNDECODABLE = re.compile("([\udc80-\udcff])")  # what surrogateescape makes of a byte that is not UTF-8


def split_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[bytes]) -> list[list[int] | None]:
    """
    The tokens that texts consist of, without what a tokenizer puts before a text or splits it at.

    Unlike a text that is tokenized, these may begin inside a word, or be no valid UTF-8.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): fast or slow.
        texts (`Sequence[bytes]`): none is empty.

    Returns:
        `list[list[int] | None]`: `None` where the tokenizer cannot say the text.
    """
    encoder = ByteEncoder(tokenizer)
    speller = _Speller(tokenizer, encoder.pieces)
    splits = [speller.split(text) for text in texts]
    rest = {index: _decoded(texts[index]) for index, split in enumerate(splits) if split is None}
    valid = {index: text for index, text in rest.items() if text is not None}
    for index, encoded in zip(valid, encoder.encode(list(valid.values()), special_tokens=False), strict=True):
        ids = encoded.ids[encoded.ends > encoded.starts].tolist()
        splits[index] = None if not ids or tokenizer.unk_token_id in ids else ids
    return splits


def _decoded(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


class _Speller:
    """Splits texts by the model inside a fast tokenizer, past its normalisation, and checks the result."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._model = backend.model if backend is not None else None
        self._pieces = pieces
        self._bytes = {piece: i for i, piece in enumerate(pieces.table) if len(piece) == 1 and not pieces.special[i]}
        tokens = {i: token for token, i in tokenizer.get_vocab().items()}
        self._letters = {piece[0]: tokens[i] for piece, i in self._bytes.items()}

    def split(self, text: bytes) -> list[int] | None:
        """Ids whose bytes are those of the text; `None` if this cannot be had."""
        if self._model is None or not self._pieces.proven:
            return None
        if self._pieces.kind == "byte_level":
            ids = self._tokenize("".join(self._letters.get(byte, "") for byte in text))
        elif self._pieces.kind == "low_line":
            ids = []
            for part in filter(None, _UNDECODABLE.split(text.decode(errors="surrogateescape"))):
                byte = self._bytes.get(part.encode(errors="surrogateescape"))
                if _UNDECODABLE.match(part):
                    ids += [] if byte is None else [byte]
                else:
                    ids += self._tokenize(part.replace(" ", LOW_LINE))
        else:
            return None
        return ids if self._pieces.join(ids) == text else None

    def _tokenize(self, spelling: str) -> list[int]:
        assert self._model is not None
        return [token.id for token in self._model.tokenize(spelling)]


__all__ = ["split_texts"]
