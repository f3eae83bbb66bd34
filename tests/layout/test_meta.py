"""Facts about an architecture that need no weights."""

from __future__ import annotations

import torch

from cbd_hf.layout import count_parameters, meta_model, parameter_shapes, weight_shapes, weights_of

from ..families.configs import family_config
from ..models import random_model, tiny_config


def test_models_are_built_without_weights() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    assert {parameter.device.type for parameter in meta_model(config).parameters()} == {"meta"}
    assert config.to_dict() == before


def test_counts_and_shapes() -> None:
    config = family_config("qwen3_moe")
    model = random_model(config)
    assert parameter_shapes(config) == {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert count_parameters(config) == sum(value.numel() for value in model.parameters())
    tied, untied = (tiny_config("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert count_parameters(untied) - count_parameters(tied) == untied.vocab_size * untied.hidden_size
    assert "lm_head.weight" in parameter_shapes(untied) and "lm_head.weight" not in parameter_shapes(tied)


def test_persistent_buffers_are_weights() -> None:
    """What a checkpoint holds beside parameters must be made too; caches are left out."""
    model = random_model(tiny_config("llama"))
    model.model.register_buffer("learned", torch.zeros(3))
    model.model.register_buffer("cache", torch.zeros(3), persistent=False)
    names = weights_of(model).keys()
    assert "model.learned" in names and "model.cache" not in names
    assert names - {"model.learned"} == dict(model.named_parameters()).keys()
    assert weight_shapes(model.config) == {n: tuple(p.shape) for n, p in model.named_parameters()}
