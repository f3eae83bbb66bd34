"""The distance of hidden states: its value and gradient by a plain formula, its projection's whereabouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbd_hf.distillation.student import PROJECTION, HiddenProjection

from ..models import answers_dataset, random_model, tiny_config
from .helpers import (
    KINDS,
    Row,
    assert_same_gradients,
    dense_loss,
    make_trainer,
    student_model,
    teacher_model,
    train,
)


def two_layers(**options: Any) -> PreTrainedModel:
    return random_model(tiny_config("llama", layers=2, **options), seed=1, std=0.1)


def four_layers(**options: Any) -> PreTrainedModel:
    return random_model(tiny_config("llama", layers=4, **options), seed=2, std=0.2)


def plain_gradient(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: list[Row],
    pairs: list[tuple[int, int]],
    weight: float,
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, hidden loss and gradients of one step, each row by itself."""
    projection = HiddenProjection(student.config.hidden_size, teacher.config.hidden_size, len(pairs), seed=42)
    student, teacher = student.double(), teacher.double()
    student.add_module(PROJECTION, projection.double())
    total, distance, count = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for ids, row_labels in rows:
        labels = torch.tensor(row_labels[1:])
        chosen = labels != -100
        one, other = (model(input_ids=torch.tensor([ids]), output_hidden_states=True) for model in (student, teacher))
        total = total + dense_loss(one.logits[0, :-1][chosen], other.logits[0, :-1][chosen].detach(), labels[chosen])
        for matrix, (mine, theirs) in zip(projection.layers, pairs, strict=True):
            gap = one.hidden_states[mine] @ matrix.weight.T - other.hidden_states[theirs].detach()
            distance = distance + gap[0, :-1][chosen].square().mean(-1).sum() / len(pairs)
        count += int(chosen.sum())
    ((total + weight * distance) / count).backward()
    gradients = {name: p.grad.float() for name, p in student.named_parameters() if p.grad is not None}
    total, distance = total.detach(), distance.detach()
    return float(total + weight * distance) / count, float(distance) / count, gradients


@pytest.mark.parametrize(
    ("layers", "pairs", "heads"),
    [(None, [(2, 4)], 4), (None, [(2, 4)], 6), ([1, 2], [(1, 2), (2, 4)], 6), ([1], [(1, 2)], 2)],
)
def test_value_and_gradient(
    layers: list[int] | None, pairs: list[tuple[int, int]], heads: int, tmp_path: Path
) -> None:
    data, _, rows = KINDS["answers"]
    loss, hidden, expected = plain_gradient(two_layers(), four_layers(heads=heads), rows, pairs, 0.7)
    options: dict[str, Any] = {"hidden_loss_weight": 0.7, "hidden_loss_layers": layers}
    losses, (found,), trainer = train(
        tmp_path,
        dataset=Dataset.from_list(data),
        student=two_layers(),
        teacher=four_layers(heads=heads),
        **options,
    )
    log = trainer.state.log_history[0]
    assert losses == [pytest.approx(loss, rel=1e-4)]
    assert log["hidden_loss"] == pytest.approx(hidden, rel=1e-4)
    assert log["divergence"] == pytest.approx(loss - 0.7 * hidden, rel=1e-4)
    assert {name for name in found if PROJECTION in name} == {
        f"{PROJECTION}.layers.{index}.weight" for index in range(len(pairs))
    }
    assert_same_gradients(expected, found, 1e-4)


def test_accumulation_has_the_same_gradient(tmp_path: Path) -> None:
    options: dict[str, Any] = {"hidden_loss_weight": 0.5, "teacher": four_layers(heads=6)}
    whole, split = (
        train(
            tmp_path,
            student=two_layers(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            **options,
        )
        for size in (8, 2)
    )
    assert split[0] == pytest.approx(whole[0], rel=1e-5)
    assert_same_gradients(whole[1][0], split[1][0])


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoints_have_the_projection_and_anchors_have_not(lora: bool, tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["norm"]) if lora else None

    def make(directory: Path, steps: int) -> Any:
        return make_trainer(
            directory,
            student=two_layers(),
            teacher=four_layers(heads=6),
            peft_config=adapter,
            hidden_loss_weight=0.5,
            max_steps=steps,
            save_strategy="steps",
            save_steps=1,
            lr_scheduler_type="constant",
        )

    whole = make(tmp_path / "a", 3)
    whole.train()
    make(tmp_path / "b", 1).train()
    (checkpoint,) = (tmp_path / "b/trainer").glob("checkpoint-*")
    (path,) = checkpoint.glob("*model.safetensors")
    assert sum(PROJECTION in name for name in load_file(path)) == 1
    resumed = make(tmp_path / "b", 3)
    start = {name: value.clone() for name, value in resumed.model.named_parameters() if PROJECTION in name}
    resumed.train(resume_from_checkpoint=str(checkpoint))
    trained = [name for name, value in resumed.model.named_parameters() if value.requires_grad]
    for name, value in resumed.model.named_parameters():
        assert torch.equal(value, whole.model.get_parameter(name)), name
        if name in start and name in trained:
            assert not torch.equal(value, start[name])
    assert sum(PROJECTION in name for name in trained) == 1
    assert adapter is None or set(adapter.modules_to_save or []) == {"norm"}  # what the user gave stays

    whole.save_anchor(tmp_path / "anchor")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "anchor")
    assert {name for name, _ in saved.named_parameters()} == {name for name, _ in two_layers().named_parameters()}
    names = load_file(tmp_path / "anchor/model.safetensors")
    assert not [name for name in names if PROJECTION in name]
    tokens = torch.arange(2, 12)[None]
    whole.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            saved(input_ids=tokens).logits, whole.model(input_ids=tokens).logits, rtol=1e-4, atol=1e-5
        )


def test_the_distance_falls(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, student=two_layers(), teacher=four_layers(heads=6), hidden_loss_weight=1.0, max_steps=20
    )
    trainer.train()
    distances = [entry["hidden_loss"] for entry in trainer.state.log_history if "hidden_loss" in entry]
    assert sum(distances[-5:]) < 0.8 * sum(distances[:5])


def adapted() -> Any:
    return get_peft_model(student_model(), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_loss_layers": [2]}, r"hidden_loss_layers=\[2\] must be between 1 and 1"),
        ({"hidden_loss_layers": [0]}, r"hidden_loss_layers=\[0\] must be between"),
        ({"student": adapted}, "give the adapter as peft_config"),
        (
            {"peft_config": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])},
            "A head among an adapter's modules_to_save is one reason",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    student = options.pop("student", lambda: student_model(tie_word_embeddings=False))()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, student=student, hidden_loss_weight=0.1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_loss_weight": -1.0}, "hidden_loss_weight=-1.0 must be at least 0"),
        ({"hidden_loss_layers": [1]}, "hidden_loss_layers has no effect without"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, answers_dataset(), teacher=teacher_model(), **options)
