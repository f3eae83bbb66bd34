"""Chains whose anchors differ in depth and mix kinds of layers: every layer meets one of its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cbd_hf import CBDModel, DistillationChain, plan_config
from cbd_hf.families import get_family
from cbd_hf.layout import config_with_shape, count_parameters, layer_kinds, shape_of
from cbd_hf.sizing import corresponding_layers, lattice

from ..models import logits, random_model
from .configs import family_config


SLIDING, FULL = "sliding_attention", "full_attention"
# Name -> the options of a small and of a large anchor; hidden and heads grow as well.
PATTERNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma2": ({"layer_types": [SLIDING, FULL]}, {"layer_types": [SLIDING, FULL] * 3}),
    "gemma3_text": (
        {"layer_types": [SLIDING, SLIDING, FULL]},
        {"layer_types": [SLIDING, SLIDING, FULL] * 2},
    ),
    "smollm3": ({"no_rope_layers": [1, 0]}, {"no_rope_layers": [1, 1, 0, 1, 0]}),
    "qwen3-windows": ({"layer_types": [FULL, SLIDING]}, {"layer_types": [FULL, FULL, SLIDING, SLIDING]}),
}
SIZES: tuple[dict[str, int], ...] = tuple(
    {
        "hidden_size": 48 * n,
        "num_attention_heads": 4 * n,
        "num_key_value_heads": 2 * n,
        "intermediate_size": 64 * n,
    }
    for n in (1, 2)
)


def configs(name: str) -> list[Any]:
    found = []
    for options, size in zip(PATTERNS[name], SIZES, strict=True):
        layers = len(next(iter(options.values())))
        found.append(family_config(name, num_hidden_layers=layers, **size, **options))
    return found


@pytest.fixture(scope="module")
def chain_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DistillationChain]:
    @cache
    def make(name: str) -> DistillationChain:
        models = [random_model(config, seed=index, std=0.2) for index, config in enumerate(configs(name))]
        directory = tmp_path_factory.mktemp("chains") / "chain"
        return DistillationChain.from_anchors(models, directory, names=["small", "large"])

    return make


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_planned_configs(name: str, share: float) -> None:
    """Counts are exact, and the kinds of a target's layers are the anchors', in order."""
    small, large = configs(name)
    family = get_family(small)
    low, high = count_parameters(small), count_parameters(large)
    wanted = low + share * (high - low)
    config = plan_config(small, large, wanted)
    count = count_parameters(config)
    sizes = [count_of for _, count_of in lattice(small, large, family)]
    assert abs(count - wanted) == min(abs(size - wanted) for size in sizes)
    kinds = [layer_kinds(each, family) for each in (small, config, large)]
    assert len(kinds[1]) == shape_of(config, family).layers
    maps = corresponding_layers(small, large, config, family)
    for layer, kind in enumerate(kinds[1]):
        assert kinds[2][maps[1].sources[layer]] == kind
        assert maps[0].inserted[layer] or kinds[0][maps[0].sources[layer]] == kind
    assert [source for source, new in zip(maps[0].sources, maps[0].inserted, strict=True) if not new] == list(
        range(len(kinds[0]))
    )


@pytest.mark.parametrize("name", PATTERNS)
def test_counts_of_the_lattice(name: str) -> None:
    small, large = configs(name)
    family = get_family(small)
    for shape, count in lattice(small, large, family):
        maps = corresponding_layers(small, large, shape.layers, family)
        config = config_with_shape(large, shape, family, layers=maps[1].sources)
        assert count_parameters(config) == count, shape


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_all_of_the_small_anchor(name: str, share: float, chain_of: Callable[[str], DistillationChain]) -> None:
    """alpha = 1 and "expand" compute what it does, in a deeper and wider model of mixed layers."""
    chain = chain_of(name)
    size = chain.sizes[1] + share * (chain.sizes[0] - chain.sizes[1])
    expected = logits(chain["small"].load_model())
    for options in ({"alpha": 1}, {"initializer": "expand"}):
        model = CBDModel.from_chain(chain, size, **options)
        planned = plan_config(chain[1].config, chain[0].config, size)
        for key in ("layer_types", "no_rope_layers"):
            assert getattr(model.config, key, None) == getattr(planned, key, None)
        assert count_parameters(model.config) == model.num_parameters() == model.config.cbd["n_params"]
        actual = logits(model)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.std()))


@pytest.mark.parametrize("name", PATTERNS)
def test_a_config_of_the_callers(name: str, chain_of: Callable[[str], DistillationChain]) -> None:
    """Its own pattern is kept where it fits between the anchors', and refused where it does not."""
    chain = chain_of(name)
    small, large = (chain[key].config for key in ("small", "large"))
    family = get_family(small)
    depth = shape_of(large, family).layers - 1
    maps = corresponding_layers(small, large, depth, family)
    target = config_with_shape(large, replace(shape_of(small, family), layers=depth), family, layers=maps[1].sources)
    model = CBDModel.from_chain(chain, config=target, alpha=1)
    assert layer_kinds(model.config, family) == layer_kinds(target, family)
    expected = logits(chain["small"].load_model())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5 * float(expected.std()))
    turned = config_with_shape(target, shape_of(target, family), family, layers=list(reversed(range(depth))))
    if layer_kinds(turned, family) != layer_kinds(target, family):
        with pytest.raises(ValueError, match="do not fit, in order|no layer of the kind|different kinds"):
            CBDModel.from_chain(chain, config=turned, alpha=1)


def test_patterns_that_do_not_fit() -> None:
    kinds = ([FULL, SLIDING], [SLIDING, SLIDING, FULL])
    models = [
        random_model(family_config("gemma2", num_hidden_layers=len(types), layer_types=types), seed=len(types))
        for types in kinds
    ]
    with pytest.raises(ValueError, match="do not fit, in order"):
        plan_config(*(model.config for model in models), sum(model.num_parameters() for model in models) / 2)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere", "falcon-new", "qwen3_moe", "opt"])
def test_a_model_of_a_chain_makes_a_round_trip(name: str, tmp_path: Path) -> None:
    """save_pretrained and from_pretrained, in the usual way; tied stays tied."""
    small = family_config(name)
    family = get_family(small)
    shape = shape_of(small, family)
    deep = config_with_shape(
        small, replace(shape, layers=shape.layers + 2), family, layers=[0, *range(shape.layers), shape.layers - 1]
    )
    models = [random_model(config, seed=index, std=0.2) for index, config in enumerate((small, deep))]
    chain = DistillationChain.from_anchors(models, tmp_path / "chain", names=["small", "large"])
    model = CBDModel.from_chain(chain, sum(chain.sizes) / 2)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert loaded.config.cbd == model.config.cbd
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == small.tie_word_embeddings
