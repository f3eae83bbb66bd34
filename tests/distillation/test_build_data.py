"""The digest of a build's data: every row counts, and how they are stored does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets

from cbd_hf.distillation.build_data import rows_digest


def rows(count: int = 3000) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"é {index}" if index % 7 else None,
            "messages": [{"role": "user", "content": str(index)}] * (index % 3),
            "scores": [index, None] if index % 5 else None,
            "weight": index / 3 if index % 2 else None,
            "flag": index % 3 == 0,
        }
        for index in range(count)
    ]


def test_storage_does_not_matter(tmp_path: Path) -> None:
    dataset = Dataset.from_list(rows())
    expected = rows_digest(dataset)
    assert rows_digest(dataset.select(list(range(3000)))) == expected
    parts = [dataset.select(range(5)), dataset.select(range(5, 1500)), dataset.select(range(1500, 3000))]
    assert rows_digest(concatenate_datasets(parts)) == expected
    assert rows_digest(dataset.select(range(2999, -1, -1)).select(range(2999, -1, -1))) == expected
    assert rows_digest(dataset.select_columns(["weight", "prompt", "flag", "scores", "messages"])) == expected
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    assert rows_digest(Dataset.load_from_disk(str(tmp_path / "saved"))) == expected


@pytest.mark.parametrize("index", [1, 1501, 2999])
@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "other"},
        {"prompt": ""},
        {"messages": []},
        {"messages": [{"role": "system", "content": "x"}]},
        {"scores": [1]},
        {"weight": -1.0},
        {"flag": None},
    ],
)
def test_every_row_counts(index: int, change: dict[str, Any]) -> None:
    before, after = rows(), rows()
    after[index] |= change
    assert rows_digest(Dataset.from_list(before)) != rows_digest(Dataset.from_list(after))


def test_order_count_and_boundaries_count() -> None:
    def digest(*texts: str) -> str:
        return rows_digest(Dataset.from_dict({"text": list(texts)}))

    assert len({digest("ab", "c"), digest("a", "bc"), digest("c", "ab"), digest("ab", "c", ""), digest("abc")}) == 5
    assert rows_digest(Dataset.from_dict({"other": ["ab", "c"]})) != digest("ab", "c")
    assert len(rows_digest(Dataset.from_dict({"text": []}))) == 64
