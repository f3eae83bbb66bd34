"""What of a recipe must stay the same for a build to continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cbd_hf import StepwiseDistillationConfig
from cbd_hf.distillation.recipe import BuildArguments, differences, recipe_record


ANCHORS: list[dict[str, Any]] = [
    {"name": "mid", "num_hidden_layers": 4, "training": {"per_device_train_batch_size": 4}},
    {"name": "small", "num_hidden_layers": 3, "supervised": {"max_steps": 5, "gradient_accumulation_steps": 3}},
]


def record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int = 1, anchors: Any = ANCHORS, **options: Any
) -> dict[str, Any]:
    monkeypatch.setattr(StepwiseDistillationConfig, "world_size", processes)
    values: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2} | options
    training = StepwiseDistillationConfig(output_dir=str(tmp_path), report_to="none", **values)
    args = BuildArguments(source="s", dataset="d", anchors=anchors, supervised={"max_steps": 1})
    return recipe_record(args, training, "source", "data")


def test_rows_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = record(tmp_path, monkeypatch)
    assert one["rows_per_step"] == {
        "supervised": 16,
        "mid": 8,
        "mid/supervised": 16,
        "small": 16,
        "small/supervised": 24,
    }
    assert ANCHORS[0]["training"] == {"per_device_train_batch_size": 4}  # the recipe itself is not changed
    lines = differences(one, record(tmp_path, monkeypatch, processes=2))
    assert "rows_per_step.mid: was 8, is 16" in lines and len(lines) == 5


def test_the_same_rows_may_be_split_in_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = record(tmp_path, monkeypatch)
    anchors = [ANCHORS[0] | {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}}]
    anchors += [ANCHORS[1] | {"supervised": {"max_steps": 5, "gradient_accumulation_steps": 3}}]
    two = record(tmp_path, monkeypatch, 2, anchors, per_device_train_batch_size=4)
    assert differences(one, two) == []
    three = record(tmp_path, monkeypatch, 2, anchors, per_device_train_batch_size=4, learning_rate=1e-3)
    assert [line.split(":")[0] for line in differences(one, three)] == ["training.learning_rate"]
