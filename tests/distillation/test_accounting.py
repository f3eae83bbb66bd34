"""What a training keeps in its checkpoints, where it resumes, and which examples a bad loss names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import trainer as transformers_trainer

from cbd_hf.distillation import accounting
from cbd_hf.distillation.checkpoints import mark_complete
from cbd_hf.distillation.guards import LossError

from ..models import answers_dataset
from .helpers import make_trainer


def test_the_losses_are_kept_before_an_older_checkpoint_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate, seen = transformers_trainer.rotate_checkpoints, []

    def watched(output_dir: str, **options: Any) -> None:
        seen.append(sorted(path.parent.name for path in Path(output_dir).glob("*/cbd_losses.json")))
        rotate(output_dir=output_dir, **options)

    monkeypatch.setattr(transformers_trainer, "rotate_checkpoints", watched)
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    make_trainer(tmp_path, **steps).train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]


@pytest.mark.parametrize("marked", [True, False])
def test_resuming_passes_over_what_a_kill_left(marked: bool, tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path / "whole", max_steps=3, **steps)
    whole.train()
    make_trainer(tmp_path, max_steps=2, **steps).train()
    directory = tmp_path / "trainer"
    cut = directory / "checkpoint-2"
    if marked:
        mark_complete(directory / "checkpoint-1")
        (cut / "optimizer.pt").unlink()
    else:
        (cut / "trainer_state.json").write_text('{"global_st')  # the disk was full
    (directory / "checkpoint-3").mkdir()
    resumed = make_trainer(tmp_path, max_steps=3, **steps)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3]
    for name, value in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), value), name


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    (tmp_path / "trainer" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no checkpoint that was written to its end"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("bad", ["loss", "gradient", None])
def test_examples_are_gathered_only_to_name_them(
    bad: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[list[int]] = []

    def gather(examples: list[int]) -> list[int]:
        gathered.append(sorted(examples))
        return sorted(examples)

    monkeypatch.setattr(accounting, "gather_object", gather)
    trainer = make_trainer(tmp_path, answers_dataset(4), max_steps=2)
    weight = trainer.model.get_parameter("model.norm.weight")
    if bad is None:
        trainer.train()
        assert not gathered
        return
    if bad == "loss":
        weight.data[0] = math.nan
    else:
        weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(LossError, match=r"Examples of its global batch: 0, 1, 2, 3\."):
        trainer.train()
    assert gathered == [[0, 1, 2, 3]]
