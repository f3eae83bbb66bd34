"""The student's own samples, drawn alike however a batch is split."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from cbd_hf._trl import pad
from cbd_hf.data.columns import IGNORED


def draw_on_policy(lmbda: float, seed: int, step: int) -> bool:
    """Whether optimizer step `step` trains on the student's samples: with probability `lmbda`, alike on all ranks."""
    return random.Random(f"{seed} {step}").random() < lmbda


def prompt_of(input_ids: list[int], labels: list[int], max_length: int) -> list[int]:
    """The last `max_length` tokens before the last supervised run of a sample."""
    last = max((index for index, label in enumerate(labels) if label != IGNORED), default=len(labels) - 1)
    while last >= 0 and labels[last] != IGNORED:
        last -= 1
    return input_ids[max(0, last + 1 - max_length) : last + 1]


class KeyedSampling(LogitsProcessor):
    """
    Makes greedy decoding an exact sample from softmax(logits / temperature), by adding Gumbel noise that depends only
    on the seed, the row's key and the position. A row's sample is then the same in any batch on any process.

    Args:
        keys (`list[str]`): one for each row; rows of one key would draw the same noise.
        seed (`str`): of the whole run and step.
        prompt_width (`int`): padded width of the prompts.
        temperature (`float`): of the sampling.
    """

    def __init__(self, keys: list[str], seed: str, prompt_width: int, temperature: float) -> None:
        self.keys = [hashlib.sha256(f"{seed} {key}".encode()).digest() for key in keys]
        self.prompt_width = prompt_width
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1] - self.prompt_width
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for row, key in enumerate(self.keys):
            digest = hashlib.sha256(key + position.to_bytes(4, "little")).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            noise[row].exponential_(generator=generator)
        return scores.float() / self.temperature - noise.log().to(scores.device)


def sample_completions(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    pad_token_id: int,
    eos_token_id: int | list[int] | None,
    seed: str,
    keys: list[str] | None = None,
) -> list[list[int]]:
    """One sampled completion per prompt, cut behind its first end-of-sequence token. `keys`: see [`KeyedSampling`]."""
    keys = [str(prompt) for prompt in prompts] if keys is None else keys
    device = next(model.parameters()).device
    rows = [torch.tensor(prompt) for prompt in prompts]
    input_ids = pad(rows, padding_value=pad_token_id, padding_side="left").to(device)
    attention_mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left").to(device)
    width = input_ids.shape[1]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, eos_token_id=eos_token_id
    )
    # generate() fills what a config leaves open, such as a repetition penalty, from the model's own; put aside here.
    owner: Any = model
    if hasattr(model, "get_base_model"):  # an adapter's
        owner = owner.get_base_model()
    own, owner.generation_config = owner.generation_config, config
    try:
        generated: Any = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([KeyedSampling(keys, seed, width, temperature)]),
        )
    finally:
        owner.generation_config = own
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or [])
    completions = []
    for row in generated[:, width:].tolist():
        end = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
        completions.append(row[:end])
    return completions


def on_policy_examples(prompts: list[list[int]], completions: list[list[int]]) -> list[dict[str, Any]]:
    """Samples as training examples: the completion supervised, the prompt not."""
    return [
        {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


__all__ = ["KeyedSampling", "draw_on_policy", "on_policy_examples", "prompt_of", "sample_completions"]
