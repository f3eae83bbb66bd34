"""Single tensors brought to another width: which coordinates are kept, scaled, padded and filled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from cbd_hf.checkpoint import CheckpointReader
from cbd_hf.layout import Shape, config_with_shape, get_family, shape_of
from cbd_hf.transforms import Trans, align_layers, resize, resized_eps
from cbd_hf.transforms.width import NEW, axis_index, role_index

from ..models import FAMILY_NAMES, logits, random_model, tiny_config


def grown(config: PretrainedConfig, layers: int = 0) -> Shape:
    """One more group of heads, one wider group where heads are shared, and a wider FFN."""
    shape = shape_of(config, get_family(config))
    group = shape.group + (config.model_type != "gpt2")
    kv_heads = shape.kv_heads + 1
    heads = kv_heads * group
    return replace(
        shape, layers=shape.layers + layers, kv_heads=kv_heads, heads=heads, hidden=heads * shape.head_dim, ffn=150
    )


def test_query_heads_move_with_their_group() -> None:
    source = Shape(layers=1, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=8, vocab=8)
    target = replace(source, hidden=18, heads=9, kv_heads=3)
    new = [NEW, NEW]
    assert role_index("query", source, target) == [0, 1, 2, 3, *new, 4, 5, 6, 7, *new, *new, *new, *new]
    assert role_index("key_value", source, target) == [0, 1, 2, 3, *new]
    assert role_index("query", target, source) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert role_index("hidden", target, source) == list(range(8))


def test_packed_axes() -> None:
    source = shape_of(tiny_config("gpt2", heads=2, head_dim=2), get_family(tiny_config("gpt2")))
    target = replace(source, heads=1, kv_heads=1, hidden=2)
    axis = get_family(tiny_config("gpt2")).spec("transformer.h.0.attn.c_attn.bias").axes[0]
    assert axis_index(axis, source, target) == [0, 1, 4, 5, 8, 9]
    assert axis_index(axis, target, source) == [0, 1, NEW, NEW, 2, 3, NEW, NEW, 4, 5, NEW, NEW]


@pytest.mark.parametrize(("family", "name"), [("llama", "model.norm.weight"), ("gpt2", "transformer.ln_f.weight")])
def test_gains_are_scaled(family: str, name: str) -> None:
    config = tiny_config(family)
    layout = get_family(config)
    shape = shape_of(config, layout)
    wide = replace(shape, hidden=4 * shape.hidden)
    gain = torch.randn(shape.hidden)
    result = resize(gain, layout.spec(name), layout, shape, wide)
    torch.testing.assert_close(result[: shape.hidden], gain / 2)
    torch.testing.assert_close(result[shape.hidden :], (gain.mean() / 2).expand(3 * shape.hidden))
    torch.testing.assert_close(resize(result, layout.spec(name), layout, wide, shape), gain)
    assert resized_eps(1e-5, shape, wide) == pytest.approx(0.25e-5)


def test_layernorm_writers_are_padded_with_their_mean() -> None:
    config = tiny_config("gpt2")
    layout = get_family(config)
    shape = shape_of(config, layout)
    rows = torch.randn(shape.vocab, shape.hidden)
    wide = resize(rows, layout.spec("transformer.wte.weight"), layout, shape, replace(shape, hidden=40))
    torch.testing.assert_close(wide[:, 32:], rows.mean(1, keepdim=True).expand(-1, 8))
    torch.testing.assert_close(wide.mean(1), rows.mean(1))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fill_touches_only_free_new_coordinates(family: str) -> None:
    config = tiny_config(family)
    layout, model = get_family(config), random_model(config)
    source, target = shape_of(config, layout), grown(config)
    filled_names = set()
    for name, parameter in model.named_parameters():
        spec, tensor = layout.spec(name), parameter.detach()
        plain = resize(tensor, spec, layout, source, target)
        fill = torch.full(plain.shape, 7.0)
        filled = resize(tensor, spec, layout, source, target, fill)
        new = torch.zeros(plain.shape, dtype=torch.bool)
        for dim, axis in enumerate(spec.axes):
            index = torch.tensor(axis_index(axis, source, target))
            new |= (index == NEW).view([-1 if d == dim else 1 for d in range(new.ndim)])
        assert torch.equal(filled[~new], plain[~new]), name
        if torch.equal(filled, plain):
            continue
        filled_names.add(layout.split(name)[1])
        assert bool((filled[new] == 7).all()), name
    assert filled_names == {local for local, spec in layout.tensors.items() if spec.free} & {
        layout.split(name)[1] for name, _ in model.named_parameters()
    }
    assert len(filled_names) >= 6


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("layers", [0, 2])
def test_fill_keeps_the_function(family: str, layers: int, tmp_path: Path) -> None:
    model = random_model(tiny_config(family))
    layout = get_family(model.config)
    source, target = shape_of(model.config, layout), grown(model.config, layers)
    model.save_pretrained(tmp_path)
    config = config_with_shape(model.config, target, layout)
    setattr(config, layout.eps_field, resized_eps(getattr(config, layout.eps_field), source, target))
    result = AutoModelForCausalLM.from_config(config).eval()
    small_map, _ = align_layers(source.layers, target.layers, target.layers)
    changed = 0
    with CheckpointReader(tmp_path, model.base_model_prefix) as reader, torch.no_grad():
        trans = Trans(reader, layout, source, target, small_map)
        for name, parameter in result.named_parameters():
            value = trans.tensor(name, fill=torch.randn_like(parameter))
            changed += not torch.equal(value, trans.tensor(name))
            parameter.copy_(value)
    assert changed > 10
    expected = logits(model)
    torch.testing.assert_close(logits(result), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_same_width_returns_the_tensor_itself() -> None:
    config = tiny_config("llama")
    layout = get_family(config)
    shape = shape_of(config, layout)
    tensor = torch.randn(shape.ffn, shape.hidden)
    spec = layout.spec("model.layers.0.mlp.up_proj.weight")
    assert resize(tensor, spec, layout, shape, replace(shape, layers=9)) is tensor


def test_resizing_leaves_its_input_alone() -> None:
    config = tiny_config("gpt2")
    layout = get_family(config)
    shape = shape_of(config, layout)
    for name, parameter in random_model(config).named_parameters():
        before = parameter.detach().clone()
        resize(parameter.detach(), layout.spec(name), layout, shape, grown(config))
        assert torch.equal(parameter.detach(), before), name
