"""Run one step of stepwise distillation in this process, and take its gradient."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import TrainerCallback

from cbd_hf import StepwiseDistillationConfig, StepwiseDistillationTrainer
from tests.models import answers_dataset, random_model, tiny_config, tiny_tokenizer


class SaveGradient(TrainerCallback):
    def __init__(self, path: str | None) -> None:
        self.path = path
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = getattr(model, "module", model)
        self.gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if self.path and args.process_index == 0:
            torch.save(self.gradient, self.path)


def gradient(micro_batch: int, accumulation: int, path: str | None = None, **options: Any) -> dict[str, Any]:
    """Gradient and logged loss of the first global batch."""
    save = SaveGradient(path)
    with tempfile.TemporaryDirectory() as directory:
        args = StepwiseDistillationConfig(
            output_dir=directory,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            learning_rate=1e-3,
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            max_new_tokens=8,
            **options,
        )
        trainer = StepwiseDistillationTrainer(
            random_model(tiny_config("llama", layers=2), seed=1, std=0.1),
            random_model(tiny_config("llama", layers=3, heads=6), seed=2, std=0.3),
            args,
            train_dataset=answers_dataset(),
            processing_class=tiny_tokenizer(),
            callbacks=[save],
        )
        trainer.train()
        loss = trainer.state.log_history[0]["loss"]
    return {"gradient": save.gradient, "loss": loss}


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest over parameters of |a - b| / |a|, in the 2-norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-12)) for name in one)
