"""What generates: `model.generate` of transformers, or vLLM."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cbd_hf._trl import pad
from cbd_hf.distillation.on_policy import KeyedSampling


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cbd_hf.distillation.answers.manifest import AnswersSettings


class Engine(Protocol):
    """Answers prompts."""

    def answer(self, prompts: Sequence[list[int]], keys: Sequence[str]) -> list[list[int]]:
        """Tokens that follow each prompt, up to and with the first end token; one key per answer, all different."""


class MaskedNoRepeatNGram(NoRepeatNGramLogitsProcessor):
    """
    Bans repeated n-grams; padding on the left is no part of any.

    Args:
        ngram_size (`int`): no run of this many tokens occurs twice.
        padding (`torch.Tensor`): bool, shape (rows, width of the prompts).
    """

    def __init__(self, ngram_size: int, padding: torch.Tensor) -> None:
        super().__init__(ngram_size)
        self.padding = padding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = input_ids.clone()
        tokens[:, : self.padding.shape[1]].masked_fill_(self.padding, scores.shape[-1])  # a token that is none
        return super().__call__(tokens, scores)


class TransformersEngine:
    """
    Batches of prompts of similar length through `model.generate`.

    Args:
        model (`PreTrainedModel`): on its device; its generation config is replaced.
        settings ([`AnswersSettings`]): of the sampling.
        end_token_ids (`list[int]`): tokens that end an answer.
        pad_token_id (`int`): any token.
        batch_size (`int`): answers at once. Changes rounding only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: AnswersSettings,
        end_token_ids: list[int],
        pad_token_id: int,
        batch_size: int,
    ) -> None:
        self.model = model.eval()
        self.settings = settings
        self.end_token_ids = end_token_ids
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        # In place of the checkpoint's own, from which generate() would fill in a repetition penalty, for example.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=pad_token_id,
            eos_token_id=end_token_ids or None,
        )

    @torch.inference_mode()
    def answer(self, prompts: Sequence[list[int]], keys: Sequence[str]) -> list[list[int]]:
        """See [`Engine`]."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        answers: list[list[int]] = [[] for _ in prompts]
        generate: Any = self.model.generate
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            rows = [torch.tensor(prompts[index]) for index in chosen]
            tokens = pad(rows, padding_value=self.pad_token_id, padding_side="left").to(device)
            mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left").to(device)
            generated = generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=self.model.generation_config,
                logits_processor=self._processors([keys[index] for index in chosen], mask),
                # Under ZeRO-3's options processes would wait for each other at every token, also for those that have
                # nothing to answer; this model is whole.
                synced_gpus=False,
            )
            for index, row in zip(chosen, generated[:, tokens.shape[1] :].tolist(), strict=True):
                answers[index] = cut(row, self.end_token_ids)
        return answers

    def _processors(self, keys: list[str], mask: torch.Tensor) -> LogitsProcessorList:
        settings = self.settings
        processors = LogitsProcessorList()
        if settings.no_repeat_ngram_size:
            processors.append(MaskedNoRepeatNGram(settings.no_repeat_ngram_size, mask == 0))
        if settings.temperature == 0:
            return processors
        if settings.temperature != 1:
            processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(settings.top_p))
        processors.append(KeyedSampling(keys, str(settings.seed), mask.shape[1], 1.0))
        return processors


class VllmEngine:
    """
    All prompts of a shard at once through vLLM, each answer with a seed of its own.

    Args:
        checkpoint (`Path`): of the source.
        settings ([`AnswersSettings`]): of the sampling.
        end_token_ids (`list[int]`): tokens that end an answer.
        options (`dict`): passed to `vllm.LLM`, such as `tensor_parallel_size`.
    """

    def __init__(
        self, checkpoint: Path, settings: AnswersSettings, end_token_ids: list[int], options: dict[str, Any]
    ) -> None:
        from vllm import LLM

        self.settings = settings
        self.end_token_ids = end_token_ids
        self.model = LLM(model=str(checkpoint), **options)

    def answer(self, prompts: Sequence[list[int]], keys: Sequence[str]) -> list[list[int]]:
        """See [`Engine`]."""
        from vllm import SamplingParams

        settings = self.settings
        parameters = [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_tokens=settings.max_new_tokens,
                seed=_seed_of(settings.seed, key),
                stop_token_ids=self.end_token_ids,
                detokenize=False,
            )
            for key in keys
        ]
        outputs = self.model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling_params=parameters, use_tqdm=False
        )
        return [cut(list(output.outputs[0].token_ids), self.end_token_ids) for output in outputs]


def check_engine(settings: AnswersSettings, processes: int) -> None:
    """
    Raise unless the engine of the settings can run here.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: vLLM is wanted in several processes.
    """
    if settings.engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("engine=vllm needs vLLM. Run: pip install vllm, or leave engine out.")
    if processes > 1:
        raise ValueError(
            f"vLLM spreads the work itself, but there are {processes} processes: start one, and set "
            "tensor_parallel_size or data_parallel_size in model_init_kwargs."
        )


def engine_version(settings: AnswersSettings) -> dict[str, str]:
    """Name and version of the engine where it is no package that is recorded anyway."""
    if settings.engine != "vllm":
        return {}
    import vllm

    return {"vllm": vllm.__version__}


def cut(tokens: list[int], end_token_ids: Sequence[int]) -> list[int]:
    """Tokens up to and with the first end token."""
    return tokens[: next((index + 1 for index, token in enumerate(tokens) if token in end_token_ids), len(tokens))]


def _seed_of(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "little") >> 1


__all__ = [
    "Engine",
    "MaskedNoRepeatNGram",
    "TransformersEngine",
    "VllmEngine",
    "check_engine",
    "cut",
    "engine_version",
]
