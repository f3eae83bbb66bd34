"""Small tokenizers of every kind, trained on a few sentences when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


CORPUS = [
    "The cat sat on the mat, and the other cats sat there too; they were not thinking of anything at all.",
    "A Cat, 2 dogs; 345 birds and more... It's what they'd have said, isn't it? He said: \"No!\" (and left).",
    "In 1969 the first men walked on the moon.\n\nTheir words are known:\tthat's one small step for a man.",
    "    def function(value):\n        return value + 1\n",
    "na\u00efve caf\u00e9 \u0161koda \u00fcber stra\u00dfe gar\u00e7on",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440, \u043a\u0430\u043a \u0434\u0435\u043b\u0430",
    "\u4f60\u597d\u3001\u4e16\u754c \ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
] * 4

END, TURN = "<|end|>", "<|turn|>"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)  # Llama-3's


def wrapped(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(TURN, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, **options)


def byte_level(corpus: list[str] = CORPUS, size: int = 500) -> PreTrainedTokenizerFast:
    """As GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return wrapped(tokenizer)


def byte_level_nfc() -> PreTrainedTokenizerFast:
    """As Qwen's: composes characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


def byte_level_prefix() -> PreTrainedTokenizerFast:
    """As GPT-2's with `add_prefix_space`, and with added tokens that take in spaces or are no special ones."""
    tokenizer = byte_level(size=400).backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("<mask>", lstrip=True, special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def _byte_fallback(normalizer: Any, pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no pieces of several words
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=["<unk>"], limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = model["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer.model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return wrapped(tokenizer, unk_token="<unk>")


def byte_fallback_prefix() -> PreTrainedTokenizerFast:
    """As Llama-2's: a low line before every stretch of text."""
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return _byte_fallback(normalizer, None)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Gemma's: no prefix."""
    return _byte_fallback(normalizers.Replace(" ", "\u2581"), pre_tokenizers.Split(" ", "merged_with_previous"))


def metaspace() -> PreTrainedTokenizerFast:
    """As transformers loads Mistral's: a prefix before the first word only."""
    return _byte_fallback(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: NFKC, runs of spaces collapsed, unknown characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, no accents, no spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer, unk_token="[UNK]")


def slow_bytes() -> PreTrainedTokenizerBase:
    """Python only: a character for every byte."""
    return ByT5Tokenizer(extra_ids=2)


class SlowPieces(PreTrainedTokenizer):
    """
    Python only: ASCII characters and a few longer pieces.

    Args:
        change (`Callable`): what is done to a text first.
    """

    def __init__(self, change: Callable[[str], str] = str, **options: Any) -> None:
        pieces = ["<unk>", *map(chr, range(128)), " the", "at", "ing", " and"]
        self.change = change
        self.vocabulary = {piece: i for i, piece in enumerate(pieces)}
        super().__init__(unk_token="<unk>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary | self.added_tokens_encoder

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        text, pieces = self.change(text), []
        while text:
            length = next(n for n in (4, 3, 2, 1) if n == 1 or text[:n] in self.vocabulary)
            pieces.append(text[:length])
            text = text[length:]
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocabulary.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return [*self.vocabulary][index]


BUILDERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    builder.__name__: builder
    for builder in (
        byte_level,
        byte_level_nfc,
        byte_level_prefix,
        byte_fallback_prefix,
        byte_fallback,
        metaspace,
        unigram,
        word_piece,
        slow_bytes,
    )
}
LOSSLESS = ("byte_level", "byte_fallback_prefix", "byte_fallback", "slow_bytes")  # whatever the text, its bytes


@cache
def build(name: str) -> PreTrainedTokenizerBase:
    """One of `BUILDERS`, trained once."""
    return BUILDERS[name]()
