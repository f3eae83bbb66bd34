"""Evaluation, numbers of other precision, and compiled layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from cbd_hf import StepwiseDistillationTrainer

from ..models import VOCAB, answers_dataset, tiny_tokenizer
from .helpers import (
    KINDS,
    assert_same_gradients,
    dense_mean,
    make_config,
    make_trainer,
    student_model,
    teacher_model,
    train,
)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"objective": "forward_kl", "cross_entropy_weight": 0.4, "temperature": 2.0}])
def test_the_loss_is_the_mean_over_tokens(options: dict[str, Any], batch: int, tmp_path: Path) -> None:
    """However the rows are split into batches."""
    rows = [row for kind in ("messages", "answers") for row in KINDS[kind][2]]
    data = Dataset.from_list([{"input_ids": list(ids), "labels": list(labels)} for ids, labels in rows])
    expected = dense_mean(student_model(), teacher_model(), rows, VOCAB, **options)
    trainer = make_trainer(tmp_path, eval_dataset=data, per_device_eval_batch_size=batch, **options)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    divergence = dense_mean(student_model(), teacher_model(), rows, VOCAB, **options | {"cross_entropy_weight": 0.0})
    assert metrics["eval_divergence"] == pytest.approx(divergence, rel=1e-4)
    trainer.train()
    trainer.model.load_state_dict(student_model().state_dict())
    assert trainer.evaluate(metric_key_prefix="again")["again_loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.evaluate()["eval_divergence"] == pytest.approx(divergence, rel=1e-4)


def test_several_datasets(tmp_path: Path) -> None:
    data = {kind: Dataset.from_list(KINDS[kind][0]) for kind in ("answers", "conversational answers")}
    trainer = make_trainer(tmp_path, eval_dataset=data)  # type: ignore[arg-type]
    metrics = trainer.evaluate()
    for kind in data:
        expected = dense_mean(student_model(), teacher_model(), KINDS[kind][2], VOCAB)
        assert metrics[f"eval_{kind}_loss"] == pytest.approx(expected, rel=1e-4)


def test_metrics_see_logits_and_labels(tmp_path: Path) -> None:
    rows = KINDS["messages"][2]
    data = Dataset.from_list([{"input_ids": list(ids), "labels": list(labels)} for ids, labels in rows])
    found = {}

    def metrics(prediction: Any) -> dict[str, float]:
        labels, logits = prediction.label_ids[:, 1:], prediction.predictions[:, :-1]
        log_probs = torch.tensor(logits).double().log_softmax(-1).numpy()
        chosen = labels != -100
        picked = np.take_along_axis(log_probs, np.where(chosen, labels, 0)[..., None], -1)[..., 0]
        found["tokens"] = int(chosen.sum())
        return {"entropy": -float(picked[chosen].mean())}

    trainer = make_trainer(tmp_path, eval_dataset=data, compute_metrics=metrics, cross_entropy_weight=1.0)
    result = trainer.evaluate()
    expected = dense_mean(student_model(), teacher_model(), rows, VOCAB, cross_entropy_weight=1.0)
    assert found["tokens"] == sum(label != -100 for _, labels in rows for label in labels[1:])
    assert result["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert result["eval_entropy"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("by", ["path", "model"])
def test_the_teachers_dtype(by: str, tmp_path: Path) -> None:
    """It changes the teacher's rounding and nothing else; the student stays in float32."""
    teacher: Any = teacher_model()
    if by == "path":
        teacher.save_pretrained(tmp_path / "teacher")
        teacher = str(tmp_path / "teacher")
    losses, (gradients,), trainer = train(tmp_path, teacher=teacher, teacher_dtype="bfloat16")
    assert {parameter.dtype for parameter in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    expected, (others,), _ = train(tmp_path)
    assert losses == pytest.approx(expected, rel=0.02) and losses != expected
    assert_same_gradients(others, gradients, 0.1)
    assert_same_gradients(train(tmp_path, teacher=teacher_model().bfloat16().float())[1][0], gradients, 0.1)


def test_a_student_by_path_is_trained_in_float32(tmp_path: Path) -> None:
    """Whatever it is stored in: small updates vanish in bfloat16. `model_init_kwargs` may say otherwise."""
    student_model().bfloat16().save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    for options, expected in (({}, torch.float32), ({"model_init_kwargs": {"dtype": "bfloat16"}}, torch.bfloat16)):
        trainer = StepwiseDistillationTrainer(
            str(tmp_path / "student"),
            teacher_model(),
            make_config(tmp_path, **options),
            train_dataset=answers_dataset(),
        )
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {expected}
        trainer.train()


def test_mixed_precision(tmp_path: Path) -> None:
    losses, (gradients,), _ = train(tmp_path)
    others, (mixed,), _ = train(tmp_path, bf16=True)
    assert others == pytest.approx(losses, rel=0.02)
    assert all(value.dtype == torch.float32 for value in mixed.values())
    assert_same_gradients(gradients, mixed, 0.2)


@pytest.mark.slow
def test_compiled_layers(tmp_path: Path) -> None:
    (losses, (gradients, *_), _), (others, (compiled, *_), _) = (
        train(tmp_path, compile_layers=on, max_steps=2, hidden_loss_weight=0.5) for on in (False, True)
    )
    assert others == pytest.approx(losses, rel=1e-5)
    assert_same_gradients(gradients, compiled, 1e-5)
