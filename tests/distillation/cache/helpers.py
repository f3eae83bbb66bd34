"""Tiny teachers on disk, and what a cache of them must say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from cbd_hf import StepwiseDistillationConfig, StepwiseDistillationTrainer
from cbd_hf.distillation.cache import CacheReport, CacheSettings, build_cache
from cbd_hf.distillation.cache.keys import iter_rows

from ...models import answers_dataset, random_model, tiny_config, tiny_tokenizer


def save_teacher(directory: Path, seed: int = 2, family: str = "llama", **options: Any) -> Path:
    random_model(tiny_config(family, layers=2, **options), seed=seed, std=0.2).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def build(teacher: Path, directory: Path, dataset: Dataset | None = None, **options: Any) -> CacheReport:
    """A cache of eight rows per file in batches of three; `options` are of the settings, or of `build_cache`."""
    fields = CacheSettings.__dataclass_fields__
    settings = {"shard_rows": 8, "k": 5, "n_samples": 20} | {n: v for n, v in options.items() if n in fields}
    others = {"batch_size": 3, "progress": False} | {n: v for n, v in options.items() if n not in fields}
    dataset = answers_dataset(20) if dataset is None else dataset
    return build_cache(teacher, dataset, directory, CacheSettings(**settings), **others)


@torch.no_grad()
def dense(teacher: Path, rows: Iterable[Mapping[str, Any]], temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """
    One row after the other through the model's own forward: float64 log-probabilities, shape (positions, vocab), and
    hidden states. Packed sequences run alone.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher).eval().double()
    log_probs, hidden = [], []
    for row in iter_rows(rows):
        start = 0
        for length in [len(row.input_ids)] if row.lengths is None else row.lengths.tolist():
            tokens = torch.tensor(row.input_ids[start : start + length].tolist())[None]
            chosen = torch.from_numpy(row.supervised[start : start + length].nonzero()[0])
            outputs = model(input_ids=tokens, output_hidden_states=True)
            log_probs.append((outputs.logits[0, chosen] / temperature).log_softmax(-1))
            hidden.append(outputs.hidden_states[-1][0, chosen])
            start += length
    return {"log_probs": torch.cat(log_probs), "hidden": torch.cat(hidden)}


def training_config(directory: Path, **options: Any) -> StepwiseDistillationConfig:
    return StepwiseDistillationConfig(
        **{
            "output_dir": str(directory / "trainer"),
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "report_to": "none",
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        | options
    )


def make_trainer(directory: Path, dataset: Dataset | None = None, **options: Any) -> StepwiseDistillationTrainer:
    """Of a student of one layer; its teacher is in the options, or a random one."""
    given = "teacher_cache" in options or "teacher_model_name_or_path" in options
    return StepwiseDistillationTrainer(
        random_model(tiny_config("llama", layers=1), seed=1, std=0.1),
        None if given else random_model(tiny_config("llama", layers=2), seed=2, std=0.2),
        training_config(directory, **options),
        train_dataset=answers_dataset() if dataset is None else dataset,
        processing_class=tiny_tokenizer(),
    )


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
