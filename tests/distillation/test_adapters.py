"""Adapters: trained in every mode, merged into anchors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType
from transformers import AutoModelForCausalLM

from cbd_hf.distillation.cache import CacheSettings, build_cache

from ..models import VOCAB, answers_dataset, logits, tiny_tokenizer
from .helpers import assert_same_gradients, make_trainer, student_model, teacher_model, train


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_are_merged(tied: bool, tmp_path: Path) -> None:
    student = student_model(tie_word_embeddings=tied)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    start = logits(student_model(tie_word_embeddings=tied))
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj", "down_proj"], lora_dropout=0.0)
    trainer = make_trainer(tmp_path, student=student, peft_config=lora, max_steps=3)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    trainer.train()
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in trainer.model.named_parameters()
        if name not in trainable
    }
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], value) for name, value in before.items())

    trainer.save_anchor(tmp_path / "anchor")
    assert not list((tmp_path / "anchor").glob("adapter*"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "anchor")
    assert type(saved) is type(student)
    assert {name for name, _ in saved.named_parameters()} == before.keys()
    trainer.model.eval()
    expected = logits(trainer.model)
    torch.testing.assert_close(logits(saved), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, start, rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all tokens, so that it says what the live teacher says."""
    directory = tmp_path_factory.mktemp("lora")
    teacher_model().save_pretrained(directory / "teacher")
    tiny_tokenizer().save_pretrained(directory / "teacher")
    settings = CacheSettings(k=VOCAB, dtype="float32", hidden="float32")
    build_cache(directory / "teacher", answers_dataset(), directory / "cache", settings, progress=False)
    return directory / "cache"


MODES: dict[str, dict[str, Any]] = {
    "off-policy": {},
    "on-policy": {"lmbda": 1.0},
    "cached": {"teacher_cache": True},
    "hidden": {"hidden_loss_weight": 0.5},
    "cached, hidden": {"teacher_cache": True, "hidden_loss_weight": 0.5},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str, cache: Path, tmp_path: Path) -> None:
    """Micro-batches have the gradient of the whole batch, and what is saved is what was trained."""
    options = dict(MODES[mode])
    if "teacher_cache" in options:
        options["teacher_cache"] = str(cache)
    found = []
    for size in (8, 2):
        lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.0, init_lora_weights=False)
        torch.manual_seed(3)  # of both matrices of the adapter
        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        found.append(train(tmp_path, student=student_model(), peft_config=lora, **options, **steps))
    (losses, (gradients, *_), trainer), (other_losses, (other, *_), _) = found
    assert other_losses == pytest.approx(losses, rel=1e-5)
    assert_same_gradients(gradients, other)
    assert all("lora_" in name or "projection" in name for name in gradients)
    trainer.save_anchor(tmp_path / "anchor")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "anchor")
    trainer.model.eval()
    torch.testing.assert_close(logits(saved), logits(trainer.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["cached", "cached, hidden"])
def test_a_cache_is_the_live_teacher(mode: str, cache: Path, tmp_path: Path) -> None:
    options = {name: value for name, value in MODES[mode].items() if name != "teacher_cache"}
    found = []
    for teacher in ({}, {"teacher_cache": str(cache)}):
        lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0, init_lora_weights=False)
        torch.manual_seed(3)
        found.append(train(tmp_path, student=student_model(), peft_config=lora, **options, **teacher))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_same_gradients(found[0][1][0], found[1][1][0], 1e-4)


def test_a_head_among_the_adapters_modules_trains_by_the_models_own_forward(tmp_path: Path) -> None:
    found = []
    for saved in (["lm_head"], None):
        lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, lora_dropout=0.0)
        torch.manual_seed(3)
        found.append(train(tmp_path, student=student_model(tie_word_embeddings=False), peft_config=lora))
    (losses, (gradients,), trainer), (others, _, _) = found
    assert trainer._student_loss.parts is None
    assert losses == pytest.approx(others, rel=1e-5)  # an adapter starts as nothing
    assert any("lm_head" in name and bool(value.any()) for name, value in gradients.items())


def test_learned_prompts_are_refused(tmp_path: Path) -> None:
    prompts = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="peft_config of type PromptTuningConfig learns prompts"):
        make_trainer(tmp_path, peft_config=prompts)  # type: ignore[arg-type]
