"""Tiny sources on disk, and their answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM

from cbd_hf.distillation.answers import AnswersReport, AnswersSettings, build_answers

from ...models import random_model, tiny_config, tiny_tokenizer, words


# Several words end an answer too, so that some end and some are cut.
ENDS = list(range(1, 64, 12))


def save_source(directory: Path, seed: int = 2, family: str = "llama", **options: Any) -> Path:
    model = random_model(tiny_config(family, layers=2, **options), seed=seed, std=0.2)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def questions(rows: int = 20, seed: int = 0) -> Dataset:
    """`prompt` and `completion`, with uneven lengths; the first prompt comes twice."""
    rng = random.Random(seed)
    made = [{"prompt": words(rng, rng.randint(1, 9)), "completion": words(rng, 4)} for _ in range(rows)]
    made[rows // 2] = made[0]
    return Dataset.from_list(made)


def build(source: Path, directory: Path, dataset: Dataset | None = None, **options: Any) -> AnswersReport:
    """Answers to eight prompts per file in batches of three; `options` of the settings, or of `build_answers`."""
    fields = AnswersSettings.__dataclass_fields__
    settings: dict[str, Any] = {"shard_rows": 8, "max_new_tokens": 10, "max_prompt_length": 20}
    settings |= {name: value for name, value in options.items() if name in fields}
    others = {"batch_size": 3, "progress": False} | {n: v for n, v in options.items() if n not in fields}
    dataset = questions() if dataset is None else dataset
    return build_answers(source, dataset, directory, AnswersSettings(**settings), **others)


def rows(directory: Path) -> list[dict[str, Any]]:
    paths = sorted(directory.glob("answers-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").split("\n") if line]


def completions(directory: Path) -> list[str]:
    return [row["completion"] for row in rows(directory)]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def greedy(source: Path, prompt: list[int], count: int, banned_ngram: int = 0) -> list[int]:
    """The likeliest tokens one by one, each by a forward pass over all tokens before it, without a cache."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(source).eval()
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        for token in scores.argsort(descending=True).tolist():
            runs = [tuple([*tokens, token][i : i + banned_ngram]) for i in range(len(tokens) + 2 - banned_ngram)]
            if not banned_ngram or runs[-1] not in runs[:-1]:
                break
        tokens.append(token)
        if token in ENDS:
            break
    return tokens[len(prompt) :]
