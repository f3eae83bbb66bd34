"""Importance scores, the order of removal of layers, and the sorted basis."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from cbd_hf.families import get_family
from cbd_hf.layout import shape_of
from cbd_hf.transforms import WidthMap, resize
from cbd_hf.transforms.basis import sort_by_importance
from cbd_hf.transforms.depth import without
from cbd_hf.transforms.importance import (
    Importance,
    by_block_influence,
    least_important_layers,
    measure_importance,
)

from ..models import FAMILY_NAMES, logits, random_model, random_tokens, tiny_config


def some_model(family: str, layers: int = 3) -> PreTrainedModel:
    return random_model(tiny_config(family, layers=layers, heads=6), seed=3)


def measure(model: PreTrainedModel) -> Importance:
    return measure_importance(model, get_family(model.config), [random_tokens(seed=1), random_tokens(2, 9, seed=2)])


def layer_list(model: PreTrainedModel) -> torch.nn.ModuleList:
    return model.transformer.h if model.config.model_type == "gpt2" else model.model.layers


def with_angles(angles: torch.Tensor) -> Importance:
    return Importance(torch.zeros(1), [], [], angles)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_sorting_keeps_the_function(family: str) -> None:
    model = some_model(family)
    scores = measure(model)
    before = logits(model)
    names = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sort_by_importance(model, get_family(model.config), scores)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, names[name])]
    assert len(changed) > len(names) * 2 // 3


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_sorted_models_are_sorted(family: str) -> None:
    """Measured again, every score falls: what a prefix keeps is what scored highest."""
    model = some_model(family)
    before = measure(model)
    sort_by_importance(model, get_family(model.config), before)
    after = measure(model)
    for old, new in zip(
        (before.hidden, *before.kv_heads, *before.ffn), (after.hidden, *after.kv_heads, *after.ffn), strict=True
    ):
        torch.testing.assert_close(new, old.sort(descending=True).values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after.angles, before.angles, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefix_keeps_the_highest_scored_rows(family: str) -> None:
    model = some_model(family)
    scores = measure(model)
    layout = get_family(model.config)
    name = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    embedding = model.get_parameter(name).detach().clone()
    shape = shape_of(model.config, layout)
    sort_by_importance(model, get_family(model.config), scores)
    target = replace(shape, hidden=32, heads=4, kv_heads=4 // shape.group)
    kept = resize(model.get_parameter(name).detach(), layout.spec(name), WidthMap(layout, shape, target))
    assert torch.equal(kept, embedding[:, scores.hidden.argsort(descending=True)[:32]])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_scores_against_the_activations(family: str) -> None:
    """FFN and head scores from the definition, for one layer, through an independent hook."""
    model = some_model(family)
    layer = layer_list(model)[1]
    gpt2 = family == "gpt2"
    modules = {
        "heads": layer.attn.c_proj if gpt2 else layer.self_attn.o_proj,
        "ffn": layer.mlp.c_proj if gpt2 else layer.mlp.down_proj,
    }
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, key=key: seen.update({key: args[0].detach()}))
        for key, module in modules.items()
    ]
    tokens = random_tokens()
    scores = measure_importance(model, get_family(model.config), [tokens])
    for handle in handles:
        handle.remove()
    expected = {}
    for key, module in modules.items():
        weight = module.weight.detach() if gpt2 else module.weight.detach().T  # [in, out]
        expected[key] = (seen[key][..., None] * weight).double().square().sum((0, 1, 3))
    torch.testing.assert_close(scores.ffn[1], expected["ffn"], rtol=1e-4, atol=1e-6)
    kv_heads = shape_of(model.config, get_family(model.config)).kv_heads
    torch.testing.assert_close(scores.kv_heads[1], expected["heads"].view(kv_heads, -1).sum(-1), rtol=1e-4, atol=1e-6)


def test_channel_scores_are_blind_to_the_stream_growing() -> None:
    """Each norm's input counts alike: together they sum to one unit per channel, norm and token."""
    model = some_model("llama")
    scores = measure_importance(model, get_family(model.config), [random_tokens()])
    norms, tokens = 2 * model.config.num_hidden_layers + 1, random_tokens().numel()
    assert float(scores.hidden.sum()) == pytest.approx(norms * tokens * model.config.hidden_size, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("planted", [1, 3, 4])
def test_a_planted_identity_layer_goes_first(family: str, planted: int) -> None:
    model = some_model(family, layers=6)
    layout = get_family(model.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if layout.split(name)[0] == planted and layout.spec(name).block_output:
                parameter.zero_()
    scores = measure(model)
    assert float(scores.angles[planted, planted + 1]) == pytest.approx(0, abs=1e-4)
    assert float(scores.angles[planted - 1, planted]) > 0.01
    assert least_important_layers(scores, 1) == [planted]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_angles_of_the_stream(family: str) -> None:
    """The last column needs the stream after the last layer, before the last norm."""
    model = some_model(family, layers=2)
    tokens = random_tokens(1, 4)
    stream: list[torch.Tensor] = []
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    watched = [*layer_list(model), norm]
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: stream.append((args[0] if args else kwargs["hidden_states"]).detach()),
            with_kwargs=True,
        )
        for module in watched
    ]
    scores = measure_importance(model, get_family(model.config), [tokens])
    for handle in handles:
        handle.remove()
    for i in range(3):
        for j in range(i + 1, 3):
            cosine = torch.nn.functional.cosine_similarity(stream[i].double(), stream[j].double(), dim=-1)
            assert float(scores.angles[i, j]) == pytest.approx(float(cosine.arccos().mean() / torch.pi), abs=1e-5)


def test_hooks_are_removed() -> None:
    model = some_model("llama")
    measure(model)
    with pytest.raises(IndexError):
        measure_importance(model, get_family(model.config), [torch.tensor([[10**6]])])
    assert not any(module._forward_pre_hooks for module in model.modules())


@given(layers=st.integers(2, 10), seed=st.integers(0, 1000))
def test_order_of_removal(layers: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(layers + 1, layers + 1, generator=generator).double()
    for count in range(layers - 1):
        order = least_important_layers(with_angles(angles), count)
        assert len(order) == count
        for length in range(1, count + 1):
            removed = sorted(order[:length])
            assert removed == list(range(removed[0], removed[0] + length))
        if count:
            start = min(order)
            assert start >= 1 and max(order) <= layers - 2
            best = min(float(angles[i, i + count]) for i in range(1, layers - count))
            assert float(angles[start, start + count]) == best


def test_cheapest_side_goes_first() -> None:
    """Of layers 1, 2 and 3, the pair 2-3 turns the stream less than 1-2, and 3 less than 2."""
    angles = torch.full((6, 6), 0.9, dtype=torch.float64)
    angles[1, 4], angles[2, 4], angles[1, 3], angles[3, 4], angles[2, 3] = 0.5, 0.3, 0.4, 0.1, 0.2
    assert least_important_layers(with_angles(angles), 3) == [3, 2, 1]
    angles[1, 3], angles[1, 2], angles[2, 3] = 0.2, 0.1, 0.15
    assert least_important_layers(with_angles(angles), 3) == [1, 2, 3]


@pytest.mark.parametrize("count", [-1, 3, 9])
def test_too_many_layers(count: int) -> None:
    with pytest.raises(ValueError, match=f"Cannot remove {count} of 4 layers: at most 2"):
        least_important_layers(with_angles(torch.zeros(5, 5)), count)


def test_block_influence_judges_every_layer_alone() -> None:
    """Layers 2 and 4 turn the stream least by themselves, though together with their neighbours they do not."""
    angles = torch.full((7, 7), 0.5, dtype=torch.float64)
    for layer, angle in enumerate([0.0, 0.3, 0.1, 0.4, 0.05, 0.01]):
        angles[layer, layer + 1] = angle
    order = by_block_influence(Importance(torch.ones(4), [], [], angles))
    assert order == [4, 2, 1, 3]  # the first and the last layer stay
    assert without(order)(6, 4).sources == (0, 1, 3, 5)
    with pytest.raises(ValueError, match="only 4 may be removed"):
        without(order)(6, 1)
