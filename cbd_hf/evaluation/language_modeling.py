"""Held-out loss of a causal language model: nats per token, and bits per byte to compare different tokenizers."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Float32 logits of one chunk stay below this, however large the vocabulary.
LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class LanguageModelingResult:
    """
    What a model makes of held-out text.

    Attributes:
        nats_per_token (`float`): mean cross-entropy of the predicted tokens.
        bits_per_byte (`float`): total cross-entropy in bits over the UTF-8 bytes that the predicted tokens cover. Does
            not depend on the vocabulary, only slightly on how much text `max_length` tokens reach.
        tokens (`int`): number of predicted tokens.
        bytes (`int`): number of UTF-8 bytes they cover.
        documents (`int`): number of documents with at least one predicted token.
    """

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean cross-entropy per token."""
        return math.exp(self.nats_per_token)

    def to_dict(self) -> dict[str, float | int]:
        """All values, with the perplexity, for JSON."""
        return {**asdict(self), "perplexity": self.perplexity}


class _Document(NamedTuple):
    tokens: list[int]
    bytes: int


def evaluate_language_modeling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_length: int = 512,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> LanguageModelingResult:
    """
    Mean loss over the first `max_length` tokens of every document.

    The first token of a document is a condition, not a prediction: where the tokenizer writes no BOS, its bytes are
    not counted either.

    Args:
        model (`PreTrainedModel`): any causal language model; it is left in the mode it came in.
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer (its offsets give the bytes).
        texts (iterable of `str`): the documents, for instance `dataset["text"]`.
        max_length (`int`, *optional*, defaults to 512): tokens taken from each document, at least 2.
        batch_size (`int`, *optional*, defaults to 8): documents per forward pass. Changes the speed, not the result.
        device (`str` or `torch.device`, *optional*): moves the model there; by default it stays where it is.
        dtype (`torch.dtype`, *optional*): compute under autocast to this type, such as `torch.bfloat16`. The
            log-softmax and the sums stay in float32 and float64.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        [`LanguageModelingResult`]

    Raises:
        ValueError: `max_length` or `batch_size` out of range, a tokenizer without offsets, token ids outside the
            model's vocabulary, or no document with two tokens.
    """
    _check_lengths(model, max_length, batch_size)
    documents = _encode(tokenizer, texts, max_length)
    largest = max(max(document.tokens) for document in documents)
    if largest >= _vocabulary_size(model):
        raise ValueError(
            f"The tokenizer gives token id {largest}, the model's vocabulary has {_vocabulary_size(model)} entries; "
            "use the tokenizer that belongs to the model."
        )
    if device is not None:
        torch.nn.Module.to(model, device)
    # Similar lengths together waste no padding; the longest first, so that a lack of memory shows at once.
    documents.sort(key=lambda document: len(document.tokens), reverse=True)
    batches = [documents[start : start + batch_size] for start in range(0, len(documents), batch_size)]
    total = 0.0
    with _evaluation_mode(model, dtype):
        scorer = _Scorer(model, documents[-1].tokens)
        for batch in tqdm(batches, desc="Held-out loss", unit="batch", disable=not progress):
            total += scorer.nats([document.tokens for document in batch])
    tokens = sum(len(document.tokens) - 1 for document in documents)
    covered = sum(document.bytes for document in documents)
    bits = total / math.log(2) / covered if covered else math.nan
    return LanguageModelingResult(total / tokens, bits, tokens, covered, len(documents))


def _check_lengths(model: PreTrainedModel, max_length: int, batch_size: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens (one is predicted from the other), got {max_length}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"max_length={max_length} is more than the model's {positions} positions; lower max_length.")


def _vocabulary_size(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_length: int) -> list[_Document]:
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no offsets; load the fast version of the tokenizer.")
    documents = []
    for text in texts:
        # verbose=False: the warning about long texts does not apply, only their head is used.
        encoding = tokenizer(text, return_offsets_mapping=True, verbose=False)
        tokens = encoding["input_ids"]
        if len(tokens) >= 2:
            covered = _predicted_bytes(text, encoding["offset_mapping"], max_length)
            documents.append(_Document(tokens[:max_length], covered))
    if not documents:
        raise ValueError("None of the texts has two tokens: there is nothing to predict.")
    return documents


def _predicted_bytes(text: str, offsets: list[tuple[int, int]], max_length: int) -> int:
    """
    Bytes from the end of the first token to the end of the last one used.

    The range as a whole, not the sum over tokens: several byte-level tokens can share one character, and some
    tokenizers leave the white space between tokens out of the offsets. A BOS ends at 0, so the whole text counts.
    """
    end = len(text) if len(offsets) <= max_length else max(end for _, end in offsets[:max_length])
    return len(text[offsets[0][1] : end].encode("utf-8", errors="replace"))


@contextlib.contextmanager
def _evaluation_mode(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    training = model.training
    model.eval()
    autocast: Any = contextlib.nullcontext()
    if dtype is not None:
        autocast = torch.autocast(model.device.type, dtype=dtype)
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        model.train(training)


class _Scorer:
    """
    Total loss of batches of token lists.

    Projects the hidden states of real positions in chunks where the logits are nothing but the output layer's; for
    models that scale or cap them afterwards it takes the model's own logits, fewer documents at a time.
    """

    def __init__(self, model: PreTrainedModel, probe: list[int]) -> None:
        # An adapter injects its layers into the model that it wraps, which alone has the parts by name.
        unwrap: Any = getattr(model, "get_base_model", None)
        self._model: Any = unwrap() if unwrap else model
        self._head: Any = self._model.get_output_embeddings()
        self._rows = max(1, LOGITS_BYTES // (4 * _vocabulary_size(self._model)))
        self._projects = self._head is not None and self._head_gives_logits(probe[:8])

    def _head_gives_logits(self, tokens: list[int]) -> bool:
        inputs, _ = self._pad([tokens])
        expected = self._model(**inputs, use_cache=False).logits.float()
        hidden = self._hidden(inputs)
        if hidden is None or hidden.shape[-1] != self._head.weight.shape[-1]:
            return False
        found = self._head(hidden).float()
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)

    def _hidden(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        backbone = self._model.base_model
        if backbone is self._model:
            return None
        return getattr(backbone(**inputs, use_cache=False), "last_hidden_state", None)

    def _pad(self, batch: list[list[int]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Right-padded inputs, and the labels of all positions but the last, -100 where there is none."""
        device = self._model.device
        rows = [torch.tensor(tokens) for tokens in batch]
        pad = torch.nn.utils.rnn.pad_sequence
        labels = pad([row[1:] for row in rows], batch_first=True, padding_value=-100)
        inputs = {
            "input_ids": pad(rows, batch_first=True).to(device),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True).to(device),
        }
        return inputs, labels.to(device)

    def nats(self, batch: list[list[int]]) -> float:
        """Sum of the cross-entropies of all tokens after the first of each list."""
        if self._projects:
            return self._nats_by_chunks(batch)
        documents = max(1, self._rows // max(len(tokens) for tokens in batch))
        parts = [batch[start : start + documents] for start in range(0, len(batch), documents)]
        return sum(self._nats_of_logits(part) for part in parts)

    def _nats_by_chunks(self, batch: list[list[int]]) -> float:
        inputs, labels = self._pad(batch)
        hidden = self._hidden(inputs)
        assert hidden is not None
        real = labels != -100
        kept, wanted = hidden[:, :-1][real], labels[real]
        chunks = zip(kept.split(self._rows), wanted.split(self._rows), strict=True)
        return sum(_cross_entropy(self._head(states), targets) for states, targets in chunks)

    def _nats_of_logits(self, batch: list[list[int]]) -> float:
        inputs, labels = self._pad(batch)
        logits = self._model(**inputs, use_cache=False).logits[:, :-1]
        real = labels != -100
        return _cross_entropy(logits[real], labels[real])


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> float:
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.float(), targets, reduction="none").double().sum().item()


__all__ = ["LanguageModelingResult", "evaluate_language_modeling"]
