"""A tiny MiniLLM trainer, and the gradient of its first step."""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from cbd_hf._ending import run_and_end
from cbd_hf.distillation.minillm.config import MiniLLMConfig
from cbd_hf.distillation.minillm.trainer import MiniLLMTrainer

from ...distributed.gradient_worker import SaveGradient
from ...models import answers_dataset, random_model, tiny_config, tiny_tokenizer, words


def student_model(**options: Any) -> PreTrainedModel:
    return random_model(tiny_config("llama", layers=1, **options), seed=1, std=0.1)


def teacher_model(**options: Any) -> PreTrainedModel:
    return random_model(tiny_config("llama", layers=2, **options), seed=2, std=0.2)


def text_dataset(rows: int = 10) -> Dataset:
    """Plain text of uneven lengths."""
    rng = random.Random(5)
    return Dataset.from_list([{"text": words(rng, rng.randint(3, 15))} for _ in range(rows)])


def make_trainer(directory: str | Path, **changes: Any) -> MiniLLMTrainer:
    """Keyword arguments are the trainer's, or else options."""
    arguments = {
        name: changes.pop(name)
        for name in ("peft_config", "text_dataset", "callbacks", "eval_dataset", "data_collator")
        if name in changes
    }
    student, teacher = changes.pop("model", None) or student_model(), changes.pop("teacher", None) or teacher_model()
    dataset = changes.pop("dataset", None) or answers_dataset()
    options = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "rollout_batch_size": 8,
        "inner_epochs": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_new_tokens": 6,
    }
    config = MiniLLMConfig(**options | changes)
    return MiniLLMTrainer(
        student, teacher, config, train_dataset=dataset, processing_class=tiny_tokenizer(), **arguments
    )


def gradient(micro_batch: int, accumulation: int, **options: Any) -> dict[str, Any]:
    """Gradient, logged values and samples of the first global batch."""
    save = SaveGradient(None)
    if options.pop("text", False):
        options |= {"text_dataset": text_dataset(), "lm_coef": 0.7, "lm_kd_ratio": 0.3}
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(
            directory,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            rollout_batch_size=16,
            max_grad_norm=0.0,
            callbacks=[save],
            **options,
        )
        trainer.train()
        log = trainer.state.log_history[0]
        rollouts = [sample.tokens.tolist() for _, sample in sorted(trainer._rollouts.items())]
    return {"gradient": save.gradient, "log": log, "rollouts": rollouts}


def make_material(directory: Path) -> None:
    """Student and teacher as checkpoints, which ZeRO-3 has to load itself."""
    for name, model in (("student", student_model()), ("teacher", teacher_model())):
        model.save_pretrained(directory / name)


def save_trained(material: str, output: str, micro_batch: int, accumulation: int) -> int:
    """Two steps, each on samples of its own; the student goes to `output`."""
    trainer = make_trainer(
        f"{output}-trainer",
        model=f"{material}/student",
        teacher=f"{material}/teacher",
        text_dataset=text_dataset(),
        lm_coef=0.5,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        inner_epochs=1,
        max_steps=2,
        max_grad_norm=0.0,
        adam_epsilon=1e-3,  # below it the first steps are the gradient's sign, which may be that of rounding
    )
    trainer.train()
    trainer.save_anchor(output)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--material")
    parser.add_argument("--output")
    parser.add_argument("--micro_batch", type=int)
    parser.add_argument("--accumulation", type=int)
    torch.set_num_threads(1)
    arguments = vars(parser.parse_args())
    run_and_end(lambda: save_trained(**arguments))
