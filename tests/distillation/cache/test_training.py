"""Training from a cache of the whole distribution is training from the teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ...models import VOCAB, answers_dataset
from .helpers import build, make_trainer, save_teacher


def train(directory: Path, **options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    trainer = make_trainer(directory, max_steps=3, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}, losses


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl"])
def test_same_as_the_live_teacher(objective: str, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    options = {"objective": objective, "temperature": 1.5}
    live, live_losses = train(tmp_path, teacher_model_name_or_path=str(teacher), **options)
    build(teacher, tmp_path / "cache", answers_dataset(30), k=VOCAB, dtype="float32", temperature=1.5)
    shutil.rmtree(teacher)
    cached, losses = train(tmp_path, teacher_cache=str(tmp_path / "cache"), **options)
    assert losses == pytest.approx(live_losses, rel=1e-4)
    for name, weight in live.items():
        assert torch.allclose(cached[name], weight, atol=1e-4), name


def test_sampled_trains(tmp_path: Path) -> None:
    build(save_teacher(tmp_path / "teacher"), tmp_path / "cache", variant="sampled", n_samples=30)
    _, losses = train(tmp_path, teacher_cache=str(tmp_path / "cache"), objective="forward_kl")
    assert all(0 < loss < 10 for loss in losses)


def test_refused_before_training(tmp_path: Path) -> None:
    build(save_teacher(tmp_path / "teacher"), tmp_path / "cache", answers_dataset(10), variant="sampled")
    for options, message in (
        ({"objective": "reverse_kl"}, "only 'forward_kl'"),
        ({"objective": "forward_kl", "temperature": 2.0}, "temperature=2.0"),
        ({"objective": "forward_kl"}, "6 of 16 rows are not in the teacher cache"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, teacher_cache=str(tmp_path / "cache"), **options)
