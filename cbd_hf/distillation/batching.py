"""Which rows make a micro-batch, and what a batch carries besides the model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import pyarrow.compute as pc
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler

from cbd_hf.distillation.columns import IGNORED


EXAMPLE_ID = "example_id"
TEACHER_ROW = "teacher_row"


class CachedRows(Protocol):
    """What the collator needs of a teacher's cache."""

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Entries of a batch for these rows of the cache, one behind the other."""
        ...


class DistillationCollator:
    """
    Adds to a collator's batches which examples they are made of, and a cached teacher's predictions.

    Args:
        collator (`Callable`): gets the examples without the columns `example_id` and `teacher_row`.
        cache (`CachedRows`, *optional*): read by `teacher_row`.
        multiple (`int`, *optional*): lengths of batches stay multiples of it.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], dict[str, Any]],
        cache: CachedRows | None = None,
        multiple: int | None = None,
    ) -> None:
        self.collator = collator
        self.cache = cache
        self.multiple = multiple or 1

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        plain = [
            {name: value for name, value in example.items() if name not in (EXAMPLE_ID, TEACHER_ROW)}
            for example in examples
        ]
        batch = trimmed(dict(self.collator(plain)), self.multiple)
        if EXAMPLE_ID in examples[0]:
            batch[EXAMPLE_ID] = torch.tensor([example[EXAMPLE_ID] for example in examples])
        if self.cache is not None:
            batch |= self.cache.batch([example[TEACHER_ROW] for example in examples])
        return batch


def trimmed(batch: dict[str, Any], multiple: int = 1) -> dict[str, Any]:
    """A padded batch without the columns behind its last supervised token, on which under causal attention nothing
    that is learnt depends."""
    if "attention_mask" not in batch or "labels" not in batch:
        return batch  # padding-free: rows lie one behind the other
    shape = batch["labels"].shape
    columns = (batch["labels"] != IGNORED).any(dim=0).nonzero().flatten()
    needed = max(2, int(columns[-1]) + 1) if len(columns) else 2
    length = min(shape[1], -(-needed // multiple) * multiple)
    return {
        name: value[:, :length] if isinstance(value, torch.Tensor) and value.shape == shape else value
        for name, value in batch.items()
    }


def number_examples(dataset: Dataset, teacher_rows: Sequence[int] | None = None) -> Dataset:
    """The dataset with a column `example_id`, and one `teacher_row` if rows of a cache are given."""
    columns = {EXAMPLE_ID: range(len(dataset))} | ({} if teacher_rows is None else {TEACHER_ROW: teacher_rows})
    for name, values in columns.items():
        if name in dataset.column_names:
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, list(values))  # type: ignore[arg-type]
    return dataset


class StepSampler(Sampler[int]):
    """
    The usual shuffled order, with the rows of each optimizer step sorted by length.

    Which rows make a step stays as it is, and so do its gradient and its loss, but rows of one micro-batch have about
    one length and need little padding, and micro-batches that run side by side on several processes take about as
    long.

    Args:
        lengths (`Sequence[int]`): tokens of each row.
        step_size (`int`): rows of one optimizer step, on all processes.
        data_seed (`int`, *optional*): of the shuffling; by default torch's initial seed.
        shuffle (`bool`, *optional*, defaults to `True`): else rows are taken in order.
    """

    def __init__(
        self, lengths: Sequence[int], step_size: int, data_seed: int | None = None, shuffle: bool = True
    ) -> None:
        self.lengths = lengths
        self.step_size = step_size
        # accelerate's own sampler, so that a step has the rows that it would have without this one.
        self.shuffled = SeedableRandomSampler(lengths, data_seed=data_seed) if shuffle else None  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.lengths)) if self.shuffled is None else self.shuffled)
        for start in range(0, len(order), self.step_size):
            # Long ones first: what does not fit in memory does not fit at once, and the heap is grown only once.
            yield from sorted(order[start : start + self.step_size], key=lambda row: -self.lengths[row])

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffling of an epoch."""
        if self.shuffled is not None:
            self.shuffled.set_epoch(epoch)


def row_lengths(dataset: Dataset) -> list[int]:
    """Number of `input_ids` of each row."""
    lengths: list[int] = []
    for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
        lengths += pc.list_value_length(table["input_ids"]).to_pylist()
    return lengths


__all__ = [
    "EXAMPLE_ID",
    "TEACHER_ROW",
    "DistillationCollator",
    "StepSampler",
    "number_examples",
    "row_lengths",
    "trimmed",
]
