"""Tokenizing plain texts whatever a tokenizer's settings are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special_tokens: bool = True) -> list[list[int]]:
    """
    The tokens of whole texts, without padding and without BOS or EOS.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): fast or slow; its settings for truncation and padding stay.
        texts (`list[str]`): of any length.
        special_tokens (`bool`, *optional*, defaults to `True`): whether a special token's text becomes that token.
    """
    if not tokenizer.is_fast:
        options = {"add_special_tokens": False, "split_special_tokens": not special_tokens, "verbose": False}
        return [tokenizer(text, **options)["input_ids"] for text in texts]
    with plain_settings(tokenizer.backend_tokenizer, special_tokens) as backend:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def token_offsets(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special_tokens: bool = True
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """[`token_ids`] of a fast tokenizer, each text's together with the characters that they cover."""
    with plain_settings(tokenizer.backend_tokenizer, special_tokens) as backend:
        encodings = backend.encode_batch(texts, add_special_tokens=False)
    return [(encoding.ids, encoding.offsets) for encoding in encodings]


@contextmanager
def plain_settings(backend: Any, special_tokens: bool) -> Iterator[Any]:
    """No truncation and no padding, and special tokens as asked for, until the tokenizer gets its settings back."""
    truncation, padding, as_text = backend.truncation, backend.padding, backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not special_tokens
    try:
        yield backend
    finally:
        backend.encode_special_tokens = as_text
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


__all__ = ["plain_settings", "token_ids", "token_offsets"]
