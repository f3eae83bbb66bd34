"""The teacher over the rows of one shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cbd_hf.distillation.cache.entries import drawn, most_likely, uniforms_of
from cbd_hf.distillation.cache.keys import Row
from cbd_hf.distillation.cache.writer import ShardBuffer
from cbd_hf.distillation.heads import parts_or_warning, picked, run_backbone
from cbd_hf.distillation.predictions import Head


# Values of a tile of logits; some copies of it exist at a time, in float32 or float64.
_TILE_VALUES = {"cpu": 2**22}
_TILE_VALUES_ELSEWHERE = 2**26


class _Sequence(NamedTuple):
    """A sequence of a row, up to its last supervised position: what comes behind has no say."""

    tokens: np.ndarray
    supervised: np.ndarray  # bool, as long as tokens
    row: int
    first: int  # of its supervised positions, counted in the row
    labels: np.ndarray  # int32, the tokens behind these positions


class TeacherPass:
    """
    Fills shards with what a teacher predicts.

    Sequences run in batches of similar length. Only supervised positions are projected to the vocabulary, in tiles, so
    that the logits of a batch never exist (but for an architecture whose head is not known, see [`find_parts`]).

    Args:
        model (`PreTrainedModel`): the teacher, where it shall run.
        vocab_size (`int`): tokens that probabilities are over.
        batch_size (`int`): sequences of a forward pass.
    """

    def __init__(self, model: Any, vocab_size: int, batch_size: int) -> None:
        self._model = model.eval()
        self._vocab_size = vocab_size
        self._batch_size = batch_size
        self._parts = parts_or_warning(model, "teacher")
        self._device = model.device
        self.has_hidden = self._parts is not None

    @torch.inference_mode()
    def fill(self, buffer: ShardBuffer, rows: Sequence[Row]) -> None:
        """Predict all supervised positions of a shard's rows."""
        sequences = sorted(_sequences(rows), key=lambda sequence: -len(sequence.tokens))
        for start in range(0, len(sequences), self._batch_size):
            batch = sequences[start : start + self._batch_size]
            states = self._states(batch)
            positions = torch.cat([_positions(buffer, sequence) for sequence in batch])
            labels = torch.from_numpy(np.concatenate([sequence.labels for sequence in batch])).long()
            uniforms = None
            if buffer.settings.variant == "sampled":
                uniforms = torch.cat([_uniforms(buffer, rows, sequence) for sequence in batch])
            with self._open_head() as head:
                for tile in self._tiles(len(positions)):
                    drawn = None if uniforms is None else uniforms[tile]
                    self._put(buffer, head, positions[tile], states[tile], labels[tile], drawn)

    def _states(self, batch: list[_Sequence]) -> torch.Tensor:
        """Hidden states of the supervised positions, shape (positions, hidden); logits if the head is not known."""
        shape = (len(batch), max(len(sequence.tokens) for sequence in batch))
        arrays = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "supervised")}
        for number, sequence in enumerate(batch):
            here = (number, slice(None, len(sequence.tokens)))
            arrays["input_ids"][here] = sequence.tokens
            arrays["attention_mask"][here] = 1
            arrays["supervised"][here] = sequence.supervised
        inputs = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
        supervised = inputs.pop("supervised").bool()
        if self._parts is None:
            states = self._model(**inputs, use_cache=False).logits
        else:
            states = run_backbone(self._parts, inputs)[0]
        return picked(states, supervised)

    def _open_head(self) -> AbstractContextManager[Head]:
        return nullcontext(Head()) if self._parts is None else self._parts.open_head()

    def _tiles(self, positions: int) -> Iterator[slice]:
        size = max(1, _TILE_VALUES.get(self._device.type, _TILE_VALUES_ELSEWHERE) // self._vocab_size)
        return (slice(start, start + size) for start in range(0, positions, size))

    def _put(
        self,
        buffer: ShardBuffer,
        head: Head,
        positions: torch.Tensor,
        states: torch.Tensor,
        labels: torch.Tensor,
        uniforms: torch.Tensor | None,
    ) -> None:
        settings = buffer.settings
        logits = _project(head, states, self._vocab_size) / settings.temperature
        log_probs = F.log_softmax(logits, dim=-1)
        more = {} if settings.hidden is None else {"hidden": states}
        if settings.labels:
            more["labels"] = log_probs.gather(-1, labels.to(log_probs.device)[:, None]).flatten()
        if uniforms is None:
            token_ids, values, tail = most_likely(log_probs, settings.k)
            buffer.put(positions, token_ids, values, tail=tail, **more)
        else:
            if log_probs.device.type == "mps":  # has no float64
                log_probs = log_probs.cpu()
            token_ids, values, counts = drawn(log_probs, uniforms.to(log_probs.device))
            buffer.put(positions, token_ids, values, counts=counts, **more)


def _sequences(rows: Sequence[Row]) -> Iterator[_Sequence]:
    for number, row in enumerate(rows):
        start = first = 0
        for length in [len(row.input_ids)] if row.lengths is None else row.lengths.tolist():
            supervised = row.supervised[start : start + length]  # the row's last token predicts nothing
            places = np.flatnonzero(supervised)
            if len(places):
                end = int(places[-1]) + 1
                labels = row.input_ids[start + 1 + places]
                yield _Sequence(row.input_ids[start : start + end], supervised[:end], number, first, labels)
            start, first = start + length, first + len(places)


def _positions(buffer: ShardBuffer, sequence: _Sequence) -> torch.Tensor:
    first = int(buffer.offsets[sequence.row]) + sequence.first
    return torch.arange(first, first + int(sequence.supervised.sum()))


def _uniforms(buffer: ShardBuffer, rows: Sequence[Row], sequence: _Sequence) -> torch.Tensor:
    row, settings = rows[sequence.row], buffer.settings
    drawn_for_row = uniforms_of(row.key(), settings.seed, int(row.supervised.sum()), settings.n_samples)
    return drawn_for_row[sequence.first : sequence.first + int(sequence.supervised.sum())]


def _project(head: Head, states: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits in float32, shape (positions, vocab_size)."""
    if head.weight is None:
        logits = states[:, :vocab_size].float()
    else:
        weight = head.weight[:vocab_size]
        states = states.to(weight.device)  # of a teacher split over devices
        if states.device.type == "cuda" and states.dtype == weight.dtype == torch.bfloat16:
            logits = torch.mm(states, weight.T, out_dtype=torch.float32)
        else:
            logits = states.float() @ weight.float().T
        if head.bias is not None:
            logits += head.bias[:vocab_size].float()
    if head.scale != 1:
        logits = logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


__all__ = ["TeacherPass"]
