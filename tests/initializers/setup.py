"""Two tiny anchors in memory and a target between them, as an initialiser sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from cbd_hf.families import get_family
from cbd_hf.initializers import INITIALIZERS, Blueprint, TensorSource, assemble
from cbd_hf.layout import Family, Shape, meta_model, shape_of, weights_of
from cbd_hf.sizing import corresponding_layers
from cbd_hf.transforms import StateDict, Trans
from cbd_hf.transforms.importance import Importance

from ..models import VOCAB, random_model, tiny_config


FAMILIES = ("gpt2", "llama", "gpt_neox")
HEAD_DIM = 8
RIVALS = sorted(set(INITIALIZERS) - {"chain", "cut", "expand"})
SMALL, LARGE, TARGET = (2, 4), (8, 8), (5, 6)  # layers, heads


def config_of(kind: str, layers: int, heads: int, **options: Any) -> PretrainedConfig:
    """Hidden = heads x 8, FFN = 4 x hidden; two query heads per key/value head in the Llama-like ones."""
    if kind == "llama-untied":
        kind, options = "llama", {"tie_word_embeddings": False, **options}
    if kind in ("gpt2", "llama"):
        return tiny_config(kind, layers, heads, **options)
    hidden = heads * HEAD_DIM
    values = {
        "vocab_size": VOCAB,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 64,
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    }
    if kind != "gpt_neox":
        values |= {"num_key_value_heads": heads // 2, "head_dim": HEAD_DIM}
    if kind == "qwen3_moe":
        values |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 3 * heads}
    return CONFIG_MAPPING[kind](**values | options)


@cache
def anchor(kind: str, layers: int, heads: int, seed: int) -> PreTrainedModel:
    return random_model(config_of(kind, layers, heads), seed)


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in weights_of(model).items()}


def scores(shape: Shape) -> Importance:
    generator = torch.Generator().manual_seed(7)

    def some(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    layers = range(shape.layers)
    angles = torch.zeros(shape.layers + 1, shape.layers + 1, dtype=torch.float64)
    for layer in layers:  # later layers matter less, so the first inner ones stay
        angles[layer, layer + 1] = 1 / (layer + 1)
    return Importance(
        some(shape.hidden), [some(shape.kv_heads) for _ in layers], [some(shape.ffn) for _ in layers], angles
    )


@dataclass
class Setup:
    """Two anchors in memory and a target, as an initialiser sees them."""

    kind: str
    small: tuple[int, int] = SMALL
    large: tuple[int, int] = LARGE
    target: tuple[int, int] = TARGET
    seed: int = 0

    @cached_property
    def anchors(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        return anchor(self.kind, *self.small, seed=1), anchor(self.kind, *self.large, seed=2)

    @cached_property
    def family(self) -> Family:
        return get_family(self.anchors[0].config)

    @cached_property
    def config(self) -> PretrainedConfig:
        return config_of(self.kind, *self.target)

    @cached_property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        small, large, target = (
            shape_of(config, self.family) for config in (*(model.config for model in self.anchors), self.config)
        )
        return small, large, target

    @cached_property
    def importance(self) -> Importance:
        return scores(self.shapes[1])

    def blueprint(self, readers: Sequence[Any] = (), calibrated: bool = True) -> Blueprint:
        configs = [model.config for model in self.anchors]
        readers = readers or [StateDict(tensors_of(model)) for model in self.anchors]
        maps = corresponding_layers(configs[0], configs[1], self.config, self.family)
        small, large = (
            Trans(reader, self.family, shape, self.shapes[2], layers)
            for reader, shape, layers in zip(readers, self.shapes[:2], maps, strict=True)
        )
        importance = (lambda: self.importance) if calibrated else None
        return Blueprint(self.config, self.family, small, large, {}, self.seed, importance)

    def source(self, name: str) -> TensorSource:
        return INITIALIZERS[name](self.blueprint())

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Everything that an initialiser makes, checked for its shape."""
        source, weights = self.source(name), weights_of(meta_model(self.config))
        for trans in source.trans:
            trans.check(weights)
        made = {key: source.make(key, None) for key in weights}
        assert {key: value.shape for key, value in made.items()} == {key: w.shape for key, w in weights.items()}
        return made

    def model(self, name: str) -> PreTrainedModel:
        """The target, with its epsilon."""
        source = self.source(name)
        for field in self.family.eps_fields:
            of_anchors = [getattr(model.config, field) for model in self.anchors]
            used = of_anchors if len(source.trans) == 2 else of_anchors[source.trans[0].source != self.shapes[0] :]
            setattr(self.config, field, source.eps(dict(enumerate(used))))
        return assemble(self.config, torch.float32, source)
