"""Blank rows, which fill up the last step of an epoch and count nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from cbd_hf.distillation.batching import (
    BLANK,
    EXAMPLE_ID,
    TEACHER_ROW,
    DistillationCollator,
    StepSampler,
    has_blank_row,
    is_blank,
    number_examples,
    with_blank_row,
)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


class Cache:
    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"teacher_log_probs": torch.tensor([[float(row)] for row in rows])}


def dataset(rows: int = 3) -> Dataset:
    plain = Dataset.from_list([{"input_ids": [row, 1, 2], "labels": [-100, 1, 2]} for row in range(rows)])
    return number_examples(plain, range(10, 10 + rows))


def test_dataset() -> None:
    extended = with_blank_row(dataset())
    assert extended[EXAMPLE_ID] == [0, 1, 2, BLANK]
    assert has_blank_row(extended) and not has_blank_row(dataset())
    assert extended.features == dataset().features


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize(("rows", "multiple"), [(13, 8), (13, 4), (16, 8), (3, 8), (9, 2)])
def test_sampler(rows: int, multiple: int, sort: bool) -> None:
    sampler = StepSampler(list(range(rows)), 8, data_seed=0, sort=sort, multiple=multiple)
    order = list(sampler)
    assert len(order) == len(sampler) and len(order) % multiple == 0 and len(order) - rows < multiple
    assert sorted(order[:rows]) == list(range(rows)) and set(order[rows:]) <= {rows}
    plain = list(StepSampler(list(range(rows)), 8, data_seed=0, sort=sort))
    assert order[:rows] == plain


def test_sampler_drops_the_last_step() -> None:
    sampler = StepSampler([1] * 13, 8, data_seed=0, drop_last=True, multiple=4)
    assert len(sampler) == len(list(sampler)) == 8


def test_collator_leaves_blank_rows_out() -> None:
    extended = with_blank_row(dataset())
    collator = DistillationCollator(collate, Cache())
    batch = collator([extended[2], extended[3], extended[3]])
    assert batch[EXAMPLE_ID].tolist() == [2] and batch["input_ids"].tolist() == [[2, 1, 2]]
    assert batch["teacher_log_probs"].tolist() == [[12.0]]
    assert not is_blank(batch)


def test_batch_of_blank_rows() -> None:
    extended = with_blank_row(dataset())
    batch = DistillationCollator(collate, Cache())([extended[3], extended[3]])
    assert is_blank(batch) and batch[EXAMPLE_ID].tolist() == [BLANK]
    assert (batch["labels"] == -100).all() and len(batch["labels"]) == 1
    assert batch["teacher_log_probs"].shape == (0, 1)


def test_rows_without_numbers_are_no_blanks() -> None:
    rows = [{name: value for name, value in row.items() if name not in (EXAMPLE_ID, TEACHER_ROW)} for row in dataset()]
    batch = DistillationCollator(collate)(rows)
    assert len(batch["labels"]) == 3 and not is_blank(batch)
