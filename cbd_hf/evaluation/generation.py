"""Answers to prompts and their Rouge-L, by the published instruction-following protocol."""

from __future__ import annotations

import contextlib
import logging
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from datasets import Dataset
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

ROUGE_L = Path(__file__).parent / "metrics" / "rouge_l"
PROTOCOL_SEEDS = (10, 20, 30, 40, 50)


@dataclass(frozen=True)
class RougeLResult:
    """
    Rouge-L of sampled answers.

    Attributes:
        mean (`float`): mean over the seeds, 0 to 100.
        std (`float`): sample standard deviation over the seeds, 0 for one seed.
        per_seed (`dict[int, float]`): the score of each seed.
        samples (`list[dict]`): some prompts with their answer under the first seed, its score and the references.
    """

    mean: float
    std: float
    per_seed: dict[int, float]
    samples: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All values, for JSON."""
        return asdict(self)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    no_repeat_ngram_size: int = 6,
    max_prompt_length: int = 256,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """
    Sample one answer to each prompt. The defaults are those of the published protocol.

    Args:
        model (`PreTrainedModel`): any causal language model, on its device.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`list[str]`): texts to continue.
        seed (`int`, *optional*, defaults to 0): the same seed, prompts and `batch_size` give the same answers; the
            global random state is left as it was.
        max_new_tokens (`int`, *optional*, defaults to 256): an answer ends there or at the end-of-text token.
        temperature (`float`, *optional*, defaults to 1.0): 0 takes the likeliest token instead of sampling.
        top_p (`float`, *optional*, defaults to 1.0): sample from the likeliest tokens of this total probability.
        top_k (`int`, *optional*, defaults to 0): sample from this many likeliest tokens; 0: from all.
        no_repeat_ngram_size (`int`, *optional*, defaults to 6): no run of this many tokens occurs twice; 0: no rule.
        max_prompt_length (`int`, *optional*, defaults to 256): longer prompts lose their first tokens.
        batch_size (`int`, *optional*, defaults to 16): prompts per generation.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        `list[str]`: the answers, without prompt, special tokens and surrounding white space.

    Raises:
        ValueError: a number out of its range, or prompt and answer together longer than the model's positions.
    """
    _check_sampling(model, temperature, top_p, max_new_tokens, max_prompt_length, batch_size)
    config = _generation_config(model, tokenizer, max_new_tokens, temperature, top_p, top_k, no_repeat_ngram_size)
    encoded = _encode_prompts(tokenizer, prompts, max_prompt_length)
    # Prompts of similar length together: less padding.
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]), reverse=True)
    answers = [""] * len(encoded)
    generate: Any = model.generate
    with _sampling_mode(model, seed):
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc=f"Answers, seed {seed}", unit="batch", disable=not progress):
            rows = order[start : start + batch_size]
            inputs = _pad_left([encoded[row] for row in rows], config.pad_token_id, model.device)
            output = generate(**inputs, generation_config=config)
            new = output[:, inputs["input_ids"].shape[1] :]
            for row, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[row] = text.strip()
    return answers


def _check_sampling(
    model: PreTrainedModel,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    max_prompt_length: int,
    batch_size: int,
) -> None:
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}.")
    lengths = {"max_new_tokens": max_new_tokens, "max_prompt_length": max_prompt_length, "batch_size": batch_size}
    for name, value in lengths.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_prompt_length + max_new_tokens > positions:
        raise ValueError(
            f"max_prompt_length={max_prompt_length} and max_new_tokens={max_new_tokens} together exceed the model's "
            f"{positions} positions; lower one of them."
        )


def _generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    no_repeat_ngram_size: int,
) -> GenerationConfig:
    from transformers import GenerationConfig

    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    # What is left unset, generate() takes from the checkpoint: name whatever would change the protocol.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        no_repeat_ngram_size=no_repeat_ngram_size,
        repetition_penalty=1.0,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
        **sampling,
    )


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, which fine-tuning appends, and those of the checkpoint."""
    stored = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = stored if isinstance(stored, list) else [stored]
    return sorted({token for token in (tokenizer.eos_token_id, *listed) if token is not None})


def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_prompt_length: int
) -> list[list[int]]:
    if not prompts:
        return []
    encoded = tokenizer(list(prompts), verbose=False)["input_ids"]
    long = sum(len(tokens) > max_prompt_length for tokens in encoded)
    if long:
        logger.warning(
            "%d of %d prompts are cut to their last %d tokens; raise max_prompt_length to keep them whole.",
            long,
            len(encoded),
            max_prompt_length,
        )
    # The end stays: it holds the words after which the model is to answer.
    return [tokens[-max_prompt_length:] for tokens in encoded]


def _pad_left(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(len(tokens) for tokens in rows)
    tokens = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(tokens, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


@contextlib.contextmanager
def _sampling_mode(model: PreTrainedModel, seed: int) -> Iterator[None]:
    training = model.training
    kind = model.device.type
    devices = [] if kind == "cpu" else [model.device]
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices, device_type="cuda" if kind == "cpu" else kind):
            torch.manual_seed(seed)
            with torch.inference_mode():
                yield
    finally:
        model.train(training)


def evaluate_rouge_l(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    seeds: Sequence[int] = PROTOCOL_SEEDS,
    num_samples: int = 10,
    **generation: Any,
) -> RougeLResult:
    """
    Rouge-L of sampled answers, averaged over seeds.

    Args:
        model (`PreTrainedModel`): any causal language model, on its device.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        dataset (`Dataset`): column `prompt`, and `references` (`list[str]`) or `completion`, as
            [`~cbd_hf.data.instructions.load_instructions`] gives them.
        seeds (`list[int]`, *optional*, defaults to `(10, 20, 30, 40, 50)`): one run of sampling for each.
        num_samples (`int`, *optional*, defaults to 10): answers to report.
        generation: passed to [`generate_answers`].

    Returns:
        [`RougeLResult`]

    Raises:
        ValueError: no seed, an empty data set, or missing columns.
        ImportError: the `evaluate` or `rouge_score` package is missing.
    """
    if not seeds:
        raise ValueError("Give at least one seed.")
    prompts, references = _questions(dataset)
    metric = _load_metric()
    per_seed: dict[int, float] = {}
    samples: list[dict[str, Any]] = []
    for seed in seeds:
        answers = generate_answers(model, tokenizer, prompts, seed=seed, **generation)
        scored = metric.compute(predictions=answers, references=references, use_aggregator=False)
        per_seed[seed] = scored["rouge_l"]
        if not samples:
            rows = zip(prompts, answers, references, scored["scores"], strict=True)
            names = ("prompt", "answer", "references", "rouge_l")
            samples = [dict(zip(names, row, strict=True)) for row in rows][:num_samples]
    scores = list(per_seed.values())
    std = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return RougeLResult(statistics.fmean(scores), std, per_seed, samples)


def _questions(dataset: Dataset) -> tuple[list[str], list[list[str]]]:
    columns = dataset.column_names
    answers = next((name for name in ("references", "completion") if name in columns), None)
    if "prompt" not in columns or answers is None:
        raise ValueError(
            f"The data set has the columns {', '.join(columns)}; needed are prompt, and references or completion."
        )
    if not len(dataset):
        raise ValueError("The data set has no example to answer.")
    references = [[text] if isinstance(text, str) else list(text) for text in dataset[answers]]
    return list(dataset["prompt"]), references


def _load_metric() -> Any:
    try:
        import evaluate
        import rouge_score  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Rouge-L needs {error.name}. Run: pip install 'cbd_hf[eval]'") from error
    return evaluate.load(str(ROUGE_L), keep_in_memory=True)


__all__ = ["PROTOCOL_SEEDS", "RougeLResult", "evaluate_rouge_l", "generate_answers"]
