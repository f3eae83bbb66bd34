"""Which rows make a micro-batch, and what a batch carries besides the model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow.compute as pc
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from cbd_hf.data.columns import EXAMPLE_ID, IGNORED


if TYPE_CHECKING:
    from cbd_hf.distillation.config import StepwiseDistillationConfig

TEACHER_ROW = "teacher_row"
BLANK = -1  # the example_id of a row that fills up a step and counts nothing
TEACHER_PREFIX = "teacher_"  # of a batch's entries that come from a cache
SOURCE_PREFIX = "source_"  # of the inputs of a source that reads other tokens than the student


class CachedRows(Protocol):
    """What the collator needs of a teacher's cache."""

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Entries of a batch for these rows of the cache, one behind the other."""
        ...


class DistillationCollator:
    """
    Adds to a collator's batches which examples they are made of, and a cached teacher's predictions.

    Blank rows are left out. A batch of nothing else is one row without labels.

    Args:
        collator (`Callable`): gets the examples without the columns `example_id` and `teacher_row`.
        cache (`CachedRows`, *optional*): read by `teacher_row`.
        multiple (`int`, *optional*): lengths of batches stay multiples of it.
        trim (`bool`, *optional*, defaults to `True`): leave out columns from which nothing is learnt. Prompts that
            answers are sampled to need them: a row of which `max_length` has cut the answer off has no labels.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], dict[str, Any]],
        cache: CachedRows | None = None,
        multiple: int | None = None,
        trim: bool = True,
    ) -> None:
        self.collator = collator
        self.cache = cache
        self.multiple = multiple or 1
        self.trim = trim

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        blank = all(example.get(EXAMPLE_ID) == BLANK for example in examples)
        examples = examples[:1] if blank else [row for row in examples if row.get(EXAMPLE_ID) != BLANK]
        plain = [
            {name: value for name, value in example.items() if name not in (EXAMPLE_ID, TEACHER_ROW)}
            for example in examples
        ]
        batch = dict(self.collator(plain))
        if blank:
            batch |= {name: torch.full_like(batch[name], IGNORED) for name in _LABELS if name in batch}
        if self.trim:
            batch = trimmed(batch, self.multiple)
        if EXAMPLE_ID in examples[0]:
            batch[EXAMPLE_ID] = torch.tensor([example[EXAMPLE_ID] for example in examples])
        if self.cache is not None:
            if TEACHER_ROW not in examples[0]:
                raise ValueError(
                    "These rows have not been looked up in the teacher's cache: give their dataset to the trainer as "
                    "train_dataset or eval_dataset."
                )
            entries = self.cache.batch([example[TEACHER_ROW] for example in examples])
            batch |= {name: value[:0] for name, value in entries.items()} if blank else entries
        return batch


_LABELS = ("labels", SOURCE_PREFIX + "labels")


def _labels_name(name: str, batch: dict[str, Any]) -> str:
    """Which entry has the labels of the model that reads another one, which has their shape."""
    labels = _LABELS[name.startswith(SOURCE_PREFIX)]
    return labels if labels in batch else _LABELS[0]


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Which positions' next token is supervised; bool, in the shape of `labels`: (rows, length)."""
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    chosen[:, :-1] = labels[:, 1:] != IGNORED
    return chosen


def trimmed(batch: dict[str, Any], multiple: int = 1) -> dict[str, Any]:
    """A padded batch without the columns behind its last supervised token, on which under causal attention nothing
    that is learnt depends."""
    if "attention_mask" not in batch or "labels" not in batch:
        return batch  # padding-free: rows lie one behind the other

    def cut(name: str, value: Any) -> Any:
        labels = batch[_labels_name(name, batch)]
        if not isinstance(value, torch.Tensor) or value.shape != labels.shape:
            return value
        columns = (labels != IGNORED).any(dim=0).nonzero().flatten()
        needed = max(2, int(columns[-1]) + 1) if len(columns) else 2
        return value[:, : -(-needed // multiple) * multiple]

    return {name: cut(name, value) for name, value in batch.items()}


def split_batch(batch: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """
    A padded batch as several, of at most `tokens` positions each (or of one row), with their own padding.

    Args:
        batch (`dict[str, Any]`): from a [`DistillationCollator`].
        tokens (`int`): positions of a part, padding included; with a source of other tokens on average of the two.
    """
    if "attention_mask" not in batch or batch["labels"].ndim != 2:
        return [batch]
    sides = {name: _needed_lengths(batch[name]) for name in _LABELS if name in batch}
    starts, widths = [0], [0] * len(sides)
    for row, lengths in enumerate(zip(*sides.values(), strict=True)):
        widths = [*map(max, widths, lengths)]
        if row > starts[-1] and (row + 1 - starts[-1]) * sum(widths) > tokens * len(sides):
            starts.append(row)
            widths = [*lengths]
    bounds = [*zip(starts, [*starts[1:], len(batch["labels"])], strict=True)]
    # Entries of a cache lie one row behind the other.
    known = batch[[*sides][-1]]
    cached = [0, *supervised_positions(known).sum(-1).cumsum(0).tolist()]

    def part(name: str, value: Any, first: int, last: int) -> Any:
        if name.startswith(TEACHER_PREFIX):
            return value[cached[first] : cached[last]]
        labels = _labels_name(name, batch)
        if value.shape != batch[labels].shape:
            return value[first:last]
        return value[first:last, : max(sides[labels][first:last])]

    return [{name: part(name, value, *bound) for name, value in batch.items()} for bound in bounds]


def first_rows(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """A padded batch from a [`DistillationCollator`] in which only its first rows, `count` many, have labels."""
    sides = [name for name in _LABELS if name in batch]
    cached = int(supervised_positions(batch[sides[-1]])[:count].sum())
    cut: dict[str, Any] = {name: batch[name].clone() for name in sides}
    for labels in cut.values():
        labels[count:] = IGNORED
    return batch | cut | {name: value[:cached] for name, value in batch.items() if name.startswith(TEACHER_PREFIX)}


def _needed_lengths(labels: torch.Tensor) -> list[int]:
    """Columns of each row up to its last supervised token."""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return ((labels != IGNORED) * positions).amax(-1).clamp(min=2).tolist()


def number_examples(dataset: Dataset, teacher_rows: Sequence[int] | None = None) -> Dataset:
    """The dataset with a column `example_id`, and one `teacher_row` if rows of a cache are given."""
    columns = {EXAMPLE_ID: range(len(dataset))} | ({} if teacher_rows is None else {TEACHER_ROW: teacher_rows})
    for name, values in columns.items():
        if name in dataset.column_names:
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, list(values))
    return dataset


def is_blank(batch: dict[str, Any]) -> bool:
    """Whether a batch from a [`DistillationCollator`] is of blank rows only."""
    return EXAMPLE_ID in batch and bool((batch[EXAMPLE_ID] == BLANK).all())


def with_blank_row(dataset: Dataset) -> Dataset:
    """The dataset of [`number_examples`] with a blank row behind its last."""
    blank = dataset.select([0]).remove_columns(EXAMPLE_ID).add_column(EXAMPLE_ID, [BLANK])
    return concatenate_datasets([dataset, blank.cast(dataset.features)])


def has_blank_row(dataset: Dataset) -> bool:
    """Whether the dataset is from [`with_blank_row`]."""
    return EXAMPLE_ID in dataset.column_names and dataset[-1][EXAMPLE_ID] == BLANK


def numbered(dataset: Any, cache: Any = None) -> Any:
    """
    [`number_examples`] of whatever a trainer takes: `None` and streams as they are, a `dict` entry by entry.

    Raises:
        ValueError: rows are not in the cache, or cannot be looked up because they are a stream.
    """
    if isinstance(dataset, dict):
        return {name: numbered(part, cache) for name, part in dataset.items()}
    if isinstance(dataset, Dataset):
        return number_examples(dataset, None if cache is None else cache.locate(dataset))
    if dataset is not None and cache is not None:
        raise ValueError("teacher_cache needs a dataset whose rows can be looked up first, not an iterable one.")
    return dataset


class StepSampler(Sampler[int]):
    """
    The usual shuffled order, with the rows of each optimizer step sorted by length.

    Which rows make a step stays as it is, and so do its gradient and its loss, but rows of one micro-batch have about
    one length and need little padding, and micro-batches that run side by side on several processes take about as
    long.

    The end of an epoch is filled up with blank rows to what all processes take at once. accelerate would fill it up
    with rows from the epoch's start, so that the last step would depend on the number of processes.

    Args:
        lengths (`Sequence[int]`): tokens of each row.
        step_size (`int`): rows of one optimizer step, on all processes.
        data_seed (`int`, *optional*): of the shuffling; by default torch's initial seed.
        shuffle (`bool`, *optional*, defaults to `True`): else rows are taken in order.
        sort (`bool`, *optional*, defaults to `True`): by length.
        multiple (`int`, *optional*, defaults to 1): rows that all processes take at once. Filled up with the row
            behind the last, for [`with_blank_row`].
        drop_last (`bool`, *optional*, defaults to `False`): leave out a step that is not whole.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        step_size: int,
        data_seed: int | None = None,
        shuffle: bool = True,
        *,
        sort: bool = True,
        multiple: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.lengths = lengths
        self.step_size = step_size
        self.sort = sort
        self.rows = len(lengths) // step_size * step_size if drop_last else len(lengths)
        self.blanks = -self.rows % multiple
        # accelerate's own sampler, so that a step has the rows that it would have without this one.
        self.shuffled = SeedableRandomSampler(lengths, data_seed=data_seed) if shuffle else None

    def __len__(self) -> int:
        return self.rows + self.blanks

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.lengths)) if self.shuffled is None else self.shuffled)
        for start in range(0, self.rows, self.step_size):
            step = order[start : start + self.step_size]
            # Long ones first: what does not fit in memory does not fit at once, and the heap is grown only once.
            yield from sorted(step, key=lambda row: -self.lengths[row]) if self.sort else step
        yield from [len(self.lengths)] * self.blanks

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffling of an epoch."""
        if self.shuffled is not None:
            self.shuffled.set_epoch(epoch)


def fills_steps(dataset: Any, args: Any) -> bool:
    """Whether rows are taken by a [`StepSampler`]: their lengths are known, and no other order is asked for."""
    known = isinstance(dataset, Dataset) and "input_ids" in dataset.column_names
    return known and args.train_sampling_strategy in ("random", "sequential")


def step_sampler(dataset: Dataset, args: StepwiseDistillationConfig) -> StepSampler:
    """
    The [`StepSampler`] of a training.

    Raises:
        ValueError: `dataloader_drop_last` leaves no row.
    """
    step_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    lengths, blank = row_lengths(dataset), has_blank_row(dataset)
    if blank:
        lengths = lengths[:-1]
    if args.dataloader_drop_last and len(lengths) < step_size:
        raise ValueError(
            f"dataloader_drop_last=True leaves nothing of {len(lengths)} rows, which are less than a step of "
            f"{step_size}: lower per_device_train_batch_size or gradient_accumulation_steps."
        )
    return StepSampler(
        lengths,
        step_size,
        args.seed if args.data_seed is None else args.data_seed,
        shuffle=args.train_sampling_strategy == "random",
        sort=args.sort_steps_by_length,
        multiple=args.train_batch_size * args.world_size if blank else 1,
        drop_last=args.dataloader_drop_last,
    )


def row_lengths(dataset: Dataset) -> list[int]:
    """Number of `input_ids` of each row."""
    lengths: list[int] = []
    for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000):
        lengths += pc.list_value_length(table["input_ids"]).to_pylist()
    return lengths


__all__ = [
    "BLANK",
    "SOURCE_PREFIX",
    "TEACHER_PREFIX",
    "TEACHER_ROW",
    "DistillationCollator",
    "StepSampler",
    "fills_steps",
    "first_rows",
    "has_blank_row",
    "is_blank",
    "number_examples",
    "numbered",
    "row_lengths",
    "split_batch",
    "step_sampler",
    "supervised_positions",
    "trimmed",
    "with_blank_row",
]
