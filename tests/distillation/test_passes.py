"""A micro-batch that runs in parts: the same rows, the same gradient."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cbd_hf.distillation.batching import split_batch

from ..distributed.gradient_worker import gradient, relative_difference
from .helpers import make_trainer


IGNORED = -100


def padded_batch(rows: list[tuple[int, int]], width: int) -> dict[str, torch.Tensor]:
    """Rows of so many tokens, of which so many at the end are supervised; two cached numbers for each of those."""
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    entries = []
    for index, (tokens, supervised) in enumerate(rows):
        ids[index, :tokens] = torch.arange(tokens) + 100 * index
        mask[index, :tokens] = 1
        labels[index, tokens - supervised : tokens] = ids[index, tokens - supervised : tokens]
        entries += labels[index, 1:][labels[index, 1:] != IGNORED].tolist()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "example_id": torch.arange(len(rows)),
        "teacher_token_ids": torch.tensor(entries)[:, None].repeat(1, 2),
        "teacher_tail": torch.tensor(entries).float(),
    }


@pytest.mark.parametrize("tokens", [1, 9, 20, 33, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_parts_are_the_batch(tokens: int, seed: int) -> None:
    rng = random.Random(seed)
    rows = [(n := rng.randint(2, 16), rng.randint(1, n)) for _ in range(9)]
    batch = padded_batch(rows, 16)
    parts = split_batch(batch, tokens)
    assert torch.cat([part["example_id"] for part in parts]).tolist() == list(range(9))
    for name in ("teacher_token_ids", "teacher_tail"):
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    seen = [
        row[mask.bool()].tolist()
        for part in parts
        for row, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
    ]
    assert seen == [
        row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    for part in parts:
        rows_in, width = part["labels"].shape
        assert rows_in == 1 or rows_in * width <= tokens
        assert width == max(rows[index][0] for index in part["example_id"].tolist())
        own = part["labels"][:, 1:][part["labels"][:, 1:] != IGNORED]
        assert torch.equal(own.float(), part["teacher_tail"])  # every entry is at its token
    assert len(parts) == 1 if tokens == 1000 else len(parts) > 1


def test_a_row_without_supervised_tokens() -> None:
    batch = padded_batch([(6, 2), (5, 0), (4, 3)], 8)
    parts = split_batch(batch, 1)
    assert [part["labels"].shape for part in parts] == [(1, 6), (1, 2), (1, 4)]
    assert [len(part["teacher_tail"]) for part in parts] == [2, 0, 3]


def test_rows_without_padding_stay_together() -> None:
    batch = {
        "input_ids": torch.arange(8)[None],
        "labels": torch.arange(8)[None],
        "position_ids": torch.arange(8)[None],
    }
    assert split_batch(batch, 2) == [batch]


@pytest.mark.parametrize("options", [{}, {"lmbda": 1.0}, {"hidden_loss_weight": 0.5}], ids=["plain", "on", "hidden"])
def test_the_gradient_stays(options: dict[str, float]) -> None:
    whole = gradient(4, 2, tokens_per_pass=0, **options)
    for tokens in (1, 40):
        parts = gradient(4, 2, tokens_per_pass=tokens, **options)
        assert relative_difference(whole["gradient"], parts["gradient"]) < 1e-5
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_default(tmp_path: Path) -> None:
    assert make_trainer(tmp_path)._tokens_per_pass == (2048 if not torch.accelerator.is_available() else 0)
    with pytest.raises(ValueError, match="tokens_per_pass=-1"):
        make_trainer(tmp_path, tokens_per_pass=-1)
