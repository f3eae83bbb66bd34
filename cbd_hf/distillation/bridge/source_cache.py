"""Rows that two models read, and a cache of the source's predictions, found by the tokens that it reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from cbd_hf.data.columns import IGNORED
from cbd_hf.distillation.batching import SOURCE_PREFIX
from cbd_hf.distillation.cache.reader import TeacherCache
from cbd_hf.tokenization.collator import BridgeDataCollator
from cbd_hf.tokenization.limits import Limits, bridge_lengths
from cbd_hf.tokenization.rows import COLUMNS, alignment_statistics, check_rows


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from cbd_hf.distillation.cache.manifest import CacheManifest

logger = logging.getLogger(__name__)

_COLUMNS = ("input_ids", "labels")
_IDS = ["input_ids", SOURCE_PREFIX + "input_ids"]
_LOOKED_AT = 64  # first rows of a stream
_CHECKED = 1000  # prepared rows in memory at once


def collator_of(
    options: Any, tokenizer: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase, limits: Sequence[Limits]
) -> BridgeDataCollator:
    """
    The collator of a training's or a cache's options.

    Args:
        options (`Any`): with `max_length`, `source_max_length`, `source_prompt`, `completion_only_loss` and
            `dataset_text_field`; `pad_to_multiple_of` if it has that.
        tokenizer, source (`PreTrainedTokenizerBase`): the student's and the source's.
        limits (`Sequence[Limits]`): of these models.

    Raises:
        ValueError: a length is more than a model's positions, or the tokenizers cannot be aligned.
    """
    max_length, source_max_length = bridge_lengths(options.max_length, options.source_max_length, *limits)
    return BridgeDataCollator(
        tokenizer,
        source,
        max_length=max_length,
        source_max_length=source_max_length,
        source_prompt=options.source_prompt,
        completion_only_loss=options.completion_only_loss,
        text_field=options.dataset_text_field,
        pad_to_multiple_of=getattr(options, "pad_to_multiple_of", None),
    ).within(*limits)


def prepare_pairs(dataset: Any, collator: BridgeDataCollator, num_proc: int | None = None, name: str = "train") -> Any:
    """
    A dataset as rows that both models read, unless it is that already.

    Args:
        dataset (`Dataset` or `IterableDataset`): `text`, `prompt` and `completion`, or `messages`.
        collator ([`BridgeDataCollator`]): between the two tokenizers.
        num_proc (`int`, *optional*): processes that tokenize.
        name (`str`, *optional*, defaults to `"train"`): for the progress bar and the log.

    Returns:
        `Dataset` or `IterableDataset`: with the columns of [`BridgeDataCollator.encode`], without rows of which
            nothing is supervised.

    Raises:
        ValueError: no row, or none of a stream's first ones, has anything that both models can learn from; or a row
            is one that a model cannot read.
    """
    columns = list(dataset.column_names or next(iter(dataset)))
    ready = set(COLUMNS) <= set(columns)
    limits = collator.max_length, collator.source_max_length
    kwargs: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": columns}
    if not hasattr(dataset, "select"):
        prepared = dataset if ready else dataset.map(collator.encode, **kwargs)
        first = list(islice(dataset, _LOOKED_AT))
        rows = [{name: row[name] for name in COLUMNS} for row in first] if ready else _rows(collator.encode(first))
        collator.check(rows)
        check_rows(rows, *limits, what=f"rows at the start of the {name} stream")
        return prepared.filter(_is_supervised, input_columns="labels")
    if ready:
        prepared = dataset
        for start in range(0, len(dataset), _CHECKED):
            part = dataset.select(range(start, min(start + _CHECKED, len(dataset)))).select_columns(_IDS)
            collator.check(_rows(part.with_format(None)[:]), range(start, start + len(part)))
    else:
        prepared = dataset.map(collator.encode, num_proc=num_proc, desc=f"Aligning {name} dataset", **kwargs)
    check_rows(prepared, *limits)
    found = alignment_statistics(prepared)
    logger.info("%s: %s", name, ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    return prepared.filter(_is_supervised, input_columns="labels", num_proc=num_proc, desc=f"Filtering {name} dataset")


def _is_supervised(labels: Sequence[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])


def _rows(columns: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def source_rows(prepared: Dataset) -> Dataset:
    """
    What a source reads of prepared rows, as rows of its own: `input_ids` and `labels`, as [`build_cache`] takes them.

    Args:
        prepared (`Dataset`): from [`~cbd_hf.tokenization.collator.BridgeDataCollator.encode`].
    """
    rows = prepared.select_columns([SOURCE_PREFIX + name for name in _COLUMNS])
    return rows.rename_columns({SOURCE_PREFIX + name: name for name in _COLUMNS})


class SourceCache:
    """
    What a trainer needs of a [`TeacherCache`], for rows that two models read.

    Args:
        cache ([`TeacherCache`]): of the source, with the log-probabilities of labels.

    Raises:
        ValueError: the cache is of sampled tokens, or has no labels.
    """

    def __init__(self, cache: TeacherCache) -> None:
        settings = cache.manifest.settings
        if settings.variant != "top_k" or not settings.labels:
            raise ValueError(
                f"The cache {cache.directory} does not do for a bridge, which needs the most likely tokens and the "
                "log-probability of every token of the data: make one with `cbd bridge cache`."
            )
        self.cache = cache

    @property
    def manifest(self) -> CacheManifest:
        """Of the cache."""
        return self.cache.manifest

    def locate(self, rows: Any) -> list[int]:
        """Where prepared rows are in the cache; see [`TeacherCache.locate`]."""
        return self.cache.locate(source_rows(rows))

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """See [`TeacherCache.batch`]."""
        return self.cache.batch(rows)


__all__ = ["SourceCache", "collator_of", "prepare_pairs", "source_rows"]
