"""Batches with two sides: trimmed, in parts, of blank rows, with a cache of what the source says."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from datasets import Dataset

from cbd_hf.distillation.batching import (
    BLANK,
    EXAMPLE_ID,
    DistillationCollator,
    is_blank,
    number_examples,
    split_batch,
    supervised_positions,
    trimmed,
    with_blank_row,
)
from cbd_hf.distillation.bridge.objectives import Vocabularies
from cbd_hf.distillation.bridge.source_cache import source_rows
from cbd_hf.distillation.bridge.spans import Alignment, followed, number_spans
from cbd_hf.distillation.bridge.tiles import tiled_span_loss
from cbd_hf.distillation.predictions import DensePredictions, Head, Predictions, SparsePredictions
from cbd_hf.tokenization.rows import COLUMNS
from cbd_hf.tokenization.vocabulary import VocabularyMap

from ..test_objectives import randn
from .helpers import padded, random_batch, random_row
from .test_objectives import make_objective


VOCAB = 60
SIDES = ("", "source_")


def last_supervised(labels: list[int]) -> int:
    return max((index + 1 for index, label in enumerate(labels) if label != -100), default=0)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("widths", [None, (60, 60), (60, 70)])
@pytest.mark.parametrize("seed", range(3))
def test_trimmed(seed: int, widths: tuple[int, int] | None, multiple: int) -> None:
    """Each side to its own last supervised token, also where both happen to be padded to one width."""
    rows = [random_row(random.Random(seed + index), 3) for index in range(5)]
    batch = padded(rows, widths) | {EXAMPLE_ID: torch.arange(5)}
    found = trimmed(batch, multiple)
    assert found.keys() == batch.keys() and torch.equal(found[EXAMPLE_ID], batch[EXAMPLE_ID])
    for side in SIDES:
        needed = max(last_supervised(row[side + "labels"]) for row in rows)
        width = min(-(-needed // multiple) * multiple, batch[side + "input_ids"].shape[1])
        for name in ("input_ids", "labels", "spans", "attention_mask"):
            assert torch.equal(found[side + name], batch[side + name][:, :width])


def test_trimmed_without_supervised_tokens() -> None:
    row = random_row(random.Random(0), 3) | {side + "labels": [-100] * 40 for side in SIDES}
    for side in SIDES:
        row[side + "labels"] = [-100] * len(row[side + "input_ids"])
    batch = padded([row])
    assert [trimmed(batch)[side + "input_ids"].shape for side in SIDES] == [(1, 2)] * 2


def test_entries_of_other_collators() -> None:
    """One whose name begins like those of a source, without a source."""
    rows = [random_row(random.Random(seed), 3) for seed in range(3)]
    names = ("input_ids", "labels", "attention_mask")
    batch = {name: value for name, value in padded(rows, (60, 60)).items() if name in names}
    batch |= {"source_of_row": torch.arange(3), "source_weights": batch["input_ids"].float()}
    for part in (trimmed(batch), *split_batch(batch, 1)):
        assert torch.equal(part["source_weights"], part["input_ids"].float())
        assert len(part["source_of_row"]) == len(part["labels"])
    assert [int(part["source_of_row"]) for part in split_batch(batch, 1)] == [0, 1, 2]


def with_entries(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With entries as a cache has them: one for each supervised position of the source, here its token and row."""
    rows, tokens = [], []
    for index, labels in enumerate(batch["source_labels"].tolist()):
        chosen = [label for label in labels[1:] if label != -100]
        rows += [index] * len(chosen)
        tokens += chosen
    entries = {"teacher_token_ids": torch.tensor([rows, tokens]).T, "teacher_labels": torch.tensor(tokens).float()}
    return batch | {EXAMPLE_ID: torch.arange(len(batch["labels"]))} | entries


@pytest.mark.parametrize("same_width", [False, True])
@pytest.mark.parametrize("tokens", [1, 15, 40, 90, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_parts_are_the_batch(seed: int, tokens: int, same_width: bool) -> None:
    _, rows = random_batch(random.Random(seed), 9)
    batch = with_entries(padded(rows, (70, 70) if same_width else None))
    parts = split_batch(batch, tokens)
    assert torch.cat([part[EXAMPLE_ID] for part in parts]).tolist() == list(range(9))
    assert len(parts) == 1 if tokens == 10_000 else len(parts) > 1
    for part in parts:
        ids = part[EXAMPLE_ID].tolist()
        size = 0
        for side in SIDES:
            needed = [max(2, last_supervised(rows[index][side + "labels"])) for index in ids]
            for name in ("input_ids", "labels", "spans"):
                assert part[side + name].shape == (len(ids), max(needed))
                for index, length, values in zip(ids, needed, part[side + name].tolist(), strict=True):
                    expected = rows[index][side + name][:length]
                    assert values[: len(expected)] == expected
            assert part[side + "attention_mask"].shape == (len(ids), max(needed))
            size += max(needed) * len(ids)
        assert len(ids) == 1 or size <= 2 * tokens
        chosen = supervised_positions(part["source_labels"])
        of_rows, positions = chosen.nonzero(as_tuple=True)
        entries = part["teacher_token_ids"]
        assert entries[:, 0].tolist() == [ids[row] for row in of_rows.tolist()]
        assert entries[:, 1].tolist() == part["source_labels"][of_rows, positions + 1].tolist()
        assert torch.equal(part["teacher_labels"], entries[:, 1].float())


def same_vocabularies() -> Vocabularies:
    ids = torch.arange(VOCAB).numpy()
    return Vocabularies.of(VocabularyMap(ids, ids, ids, ids), VOCAB, VOCAB, ids, (ids % 3 == 0, ids % 4 == 0))


def loss_of(batch: dict[str, torch.Tensor], method: str, cached: bool) -> float:
    """Of models that say the same of a token wherever it stands."""
    table, other = 2 * randn(VOCAB, VOCAB, seed=1), 2 * randn(VOCAB, VOCAB, seed=2)
    chosen, there = (supervised_positions(batch[side + "labels"]) for side in SIDES)
    own, others, count = number_spans(batch, chosen, there)
    labels, source_labels = (
        batch[side + "labels"][:, 1:][where[:, :-1]] for side, where in zip(SIDES, (chosen, there), strict=True)
    )
    alignment = Alignment(own, others, source_labels, count, followed(chosen), followed(there))
    predictions: Predictions = DensePredictions(other[batch["source_input_ids"][there]], Head().open)
    if cached:  # of one token: its entries are in the batch
        entries = batch["teacher_token_ids"]
        assert torch.equal(entries[:, 1], source_labels)
        log_p = torch.log_softmax(other[batch["source_input_ids"][there]], dim=-1).gather(-1, entries[:, 1:])
        predictions = SparsePredictions(
            entries[:, 1:], log_p, torch.log1p(-log_p[:, 0].exp()), vocab=VOCAB, labels=log_p[:, 0]
        )
    objective = make_objective(method, cross_entropy_weight=0.4)
    arguments = (table[batch["input_ids"][chosen]], Head(), predictions, labels, alignment, same_vocabularies())
    return float(tiled_span_loss(*arguments, objective)[0])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("method", ["overlap_kl forward_kl", "alm", "alm to a likely end", "mined forward_kl"])
def test_parts_add_up(method: str, cached: bool) -> None:
    batch = with_entries(random_batch(random.Random(4), 9)[0])
    whole = loss_of(batch, method, cached)
    for tokens in (1, 30, 80):
        parts = [loss_of(part, method, cached) for part in split_batch(batch, tokens)]
        assert len(parts) > 1 and sum(parts) == pytest.approx(whole, rel=1e-5)
    assert loss_of(trimmed(batch), method, cached) == pytest.approx(whole, rel=1e-5)


class Cache:
    """One entry for each supervised position of a row's source, the number of the row."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"teacher_tail": torch.cat([torch.full((self.counts[row],), float(row)) for row in rows])}


def collated() -> tuple[DistillationCollator, Dataset]:
    """Rows without a prompt: a span begins at the second token of each side."""
    rows = []
    for seed in range(3):
        row = random_row(random.Random(seed), 3)
        for side in SIDES:
            first = row[side + "spans"].index(0)
            for name in ("input_ids", "labels", "spans"):
                row[side + name] = [*row[side + name][:1], *row[side + name][first:]]
        rows.append(row)
    counts = [sum(label != -100 for label in row["source_labels"][1:]) for row in rows]
    dataset = with_blank_row(number_examples(Dataset.from_list(rows), range(3)))
    return DistillationCollator(padded, Cache(counts)), dataset


def test_batch_of_blank_rows() -> None:
    collator, dataset = collated()
    batch = collator([dataset[3], dataset[3]])
    assert is_blank(batch) and batch[EXAMPLE_ID].tolist() == [BLANK]
    assert all((batch[side + "labels"] == -100).all() for side in SIDES)
    assert batch["teacher_tail"].shape == (0,)
    for part in (batch, *split_batch(batch, 1)):
        chosen, there = (supervised_positions(part[side + "labels"]) for side in SIDES)
        own, others, count = number_spans(part, chosen, there)
        assert (len(own), len(others), count) == (0, 0, 0)


def test_blank_rows_are_left_out() -> None:
    collator, dataset = collated()
    batch = collator([dataset[2], dataset[3], dataset[0]])
    assert batch[EXAMPLE_ID].tolist() == [2, 0] and not is_blank(batch)
    expected: Any = collator([dataset[2], dataset[0]])
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert len(batch["teacher_tail"]) == int(supervised_positions(batch["source_labels"]).sum())


def test_what_a_source_reads() -> None:
    rows = [random_row(random.Random(seed)) for seed in range(3)]
    found = source_rows(Dataset.from_list(rows).add_column("kept", ["a", "b", "c"]))
    assert set(found.column_names) == {"input_ids", "labels"} and set(rows[0]) == set(COLUMNS)
    for row, expected in zip(found, rows, strict=True):
        assert row == {name: expected["source_" + name] for name in ("input_ids", "labels")}
