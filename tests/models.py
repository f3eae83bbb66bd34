"""Tiny random models and tokenizers, built from configs; nothing is downloaded."""

from __future__ import annotations

import random
from pathlib import Path
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

from cbd_hf.checkpoint import CheckpointReader
from cbd_hf.families import get_family
from cbd_hf.layout import Shape, config_with_shape, meta_model, shape_of, weights_of
from cbd_hf.transforms import First, LayerMap, Selection, Trans, align_layers, resized_eps


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


def qwen3_config(layers: int, hidden: int, ffn: int) -> Qwen3Config:
    """The full-size Qwen3 of the small checkpoints, with other depths and widths; for counting only."""
    return Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=ffn,
        vocab_size=151936,
        tie_word_embeddings=True,
    )


def random_model(config: PretrainedConfig, seed: int = 0, std: float = 0.3) -> PreTrainedModel:
    """A random model whose every parameter, norms and biases included, is far from its usual start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
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


def resized_config(
    config: PretrainedConfig, target: Shape, layers: LayerMap | None = None, growth: str = "pad"
) -> PretrainedConfig:
    """`config` with the dimensions of `target`, and the epsilon of its norms resized like their gains."""
    family = get_family(config)
    result = config_with_shape(config, target, family, layers.sources if layers is not None else None)
    for name in family.eps_fields if growth == "pad" else ():
        setattr(result, name, resized_eps(getattr(result, name), shape_of(config, family), target))
    return result


def depth_map(source: Shape, target: Shape) -> LayerMap:
    """Where the target's layers come from if nothing else is known."""
    shallow, deep = sorted((source.layers, target.layers))
    small, large = align_layers(shallow, deep, target.layers)
    return small if source.layers == shallow else large


def transform(
    model: PreTrainedModel,
    target: Shape,
    directory: Path,
    layers: LayerMap | None = None,
    *,
    expansion: str = "identity",
    selection: Selection | None = None,
    growth: str = "pad",
    fill_seed: int | None = None,
) -> PreTrainedModel:
    """The model that Trans makes of the checkpoint of `model` alone; noise at the free new coordinates if asked."""
    family = get_family(model.config)
    source = shape_of(model.config, family)
    dtype = model.dtype
    model.save_pretrained(directory)
    layers = layers or depth_map(source, target)
    config = resized_config(model.config, target, layers, growth)
    with CheckpointReader(directory, model=meta_model(model.config)) as reader, torch.no_grad():
        trans = Trans(reader, family, source, target, layers, expansion, selection or First(), growth)
        result = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
        weights = weights_of(result)
        trans.check(weights)
        generator = torch.Generator().manual_seed(fill_seed or 0)
        for name, weight in weights.items():
            fill = None if fill_seed is None else torch.randn(weight.shape, generator=generator, dtype=dtype) / 4
            value = trans.tensor(name, fill=fill, dtype=dtype)
            assert value.shape == weight.shape, name
            weight.copy_(value)
    return result
