"""Tiny random models and tokenizers, built from configs; nothing is downloaded."""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)


VOCAB = 64
FAMILY_NAMES = ("gpt2", "llama", "llama-biased", "mistral", "qwen2", "qwen3")


def tiny_config(family: str, layers: int = 3, heads: int = 4, head_dim: int = 8, **overrides: Any) -> PretrainedConfig:
    """A small config; hidden = heads x head_dim, two query heads per key/value head outside GPT-2, 4 x hidden FFN."""
    hidden = heads * head_dim
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if family == "gpt2":
        return GPT2Config(
            **{"n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": VOCAB, "n_positions": 64}
            | tokens
            | overrides
        )
    classes = {"mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    values: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": head_dim,
        "intermediate_size": 4 * hidden,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "tie_word_embeddings": family in ("llama", "qwen3"),
    }
    if family == "llama-biased":
        values |= {"attention_bias": True, "mlp_bias": True}
    return classes.get(family, LlamaConfig)(**values | tokens | overrides)


def random_model(config: PretrainedConfig, seed: int = 0, std: float = 0.3) -> PreTrainedModel:
    """A random model whose every parameter, norms and biases included, is far from its usual start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name or ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn_like(parameter) * std + offset)
    return model


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `VOCAB` tokens, w4 ... w60 and the chat template's markers."""
    special = ["<bos>", "<eos>", "<user>", "<assistant>", "<end>", "<unk>"]
    words = [f"w{index}" for index in range(VOCAB - len(special))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<end>"],
        chat_template=CHAT_TEMPLATE,
    )


def words(rng: random.Random, count: int) -> str:
    """`count` random words of [`tiny_tokenizer`]."""
    return " ".join(f"w{rng.randrange(VOCAB - 6)}" for _ in range(count))


def answers_dataset(rows: int = 16, seed: int = 0) -> Dataset:
    """`prompt` and `completion`, with uneven lengths."""
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {"prompt": words(rng, rng.randint(1, 9)), "completion": " " + words(rng, rng.randint(1, 12))}
            for _ in range(rows)
        ]
    )


def random_tokens(rows: int = 3, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Token ids, int64, shape (rows, length)."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """The model's logits in float64, shape (rows, length, vocab)."""
    tokens = random_tokens() if tokens is None else tokens
    return model.to(torch.float64)(input_ids=tokens).logits
