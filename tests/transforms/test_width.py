"""Single tensors brought to another width: which coordinates are kept, scaled, padded and filled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from cbd_hf.families import get_family
from cbd_hf.layout import Axis, Segment, Shape, shape_of
from cbd_hf.transforms import First, Stride, WidthMap, resize, resized_eps
from cbd_hf.transforms.width import NEW, Index

from ..models import FAMILY_NAMES, logits, random_model, tiny_config, transform


def grown(config: PretrainedConfig, layers: int = 0) -> Shape:
    """One more group of heads, one wider group where heads are shared, and a wider FFN."""
    shape = shape_of(config, get_family(config))
    group = shape.group + (config.model_type != "gpt2")
    kv_heads = shape.kv_heads + 1
    heads = kv_heads * group
    return replace(
        shape, layers=shape.layers + layers, kv_heads=kv_heads, heads=heads, hidden=heads * shape.head_dim, ffn=150
    )


def entries(role: str, source: Shape, target: Shape, unit: int = 1) -> list[int]:
    """Where each coordinate of one role comes from; no family's own rule is involved."""
    widths = WidthMap(get_family(tiny_config("llama")), source, target)
    axis = Axis((Segment(role, unit),), "out")
    return widths.index(axis, None, source.length(axis)).entries


def test_query_heads_move_with_their_group() -> None:
    source = Shape(layers=1, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=8, vocab=8)
    target = replace(source, hidden=18, heads=9, kv_heads=3)
    new = [NEW, NEW]
    assert entries("query", source, target, 2) == [0, 1, 2, 3, *new, 4, 5, 6, 7, *new, *new, *new, *new]
    assert entries("key_value", source, target, 2) == [0, 1, 2, 3, *new]
    assert entries("query", target, source, 2) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert entries("hidden", target, source) == list(range(8))


def test_a_group_keeps_its_key_and_value() -> None:
    """Query heads, key and value of one group lie together (Falcon's new decoder)."""
    source = Shape(layers=1, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=8, vocab=8)
    target = replace(source, heads=3, kv_heads=1)
    wide = replace(source, heads=6, kv_heads=2)
    assert entries("group", source, target) == [0, 1, NEW, 2, 3]
    assert entries("group", target, source) == [0, 1, 3, 4, NEW, NEW, NEW, NEW]
    assert entries("group", source, wide) == [0, 1, NEW, 2, 3, 4, 5, NEW, 6, 7]
    assert entries("group", wide, source) == [0, 1, 3, 4, 5, 6, 8, 9]


def test_packed_axes() -> None:
    config = tiny_config("gpt2", heads=2, head_dim=2)
    layout = get_family(config)
    source = shape_of(config, layout)
    target = replace(source, heads=1, kv_heads=1, hidden=2)
    axis = layout.spec("transformer.h.0.attn.c_attn.bias").axes[0]
    assert WidthMap(layout, source, target).index(axis, 0, source.length(axis)).entries == [0, 1, 4, 5, 8, 9]
    new = [NEW, NEW]
    assert WidthMap(layout, target, source).index(axis, 0, target.length(axis)).entries == [
        0,
        1,
        *new,
        2,
        3,
        *new,
        4,
        5,
        *new,
    ]


@pytest.mark.parametrize(
    ("entries", "available", "existing", "prefix", "identity", "has_new"),
    [
        ([0, 1, 2], 3, 3, True, True, False),
        ([0, 1], 3, 2, True, False, False),
        ([0, 1, NEW], 2, 2, True, False, True),
        ([NEW, NEW], 2, 0, True, False, True),
        ([0, NEW, 1], 2, 1, False, False, True),
        ([1, 0], 2, 2, False, False, False),
        ([0, 2], 3, 2, False, False, False),
        ([], 2, 0, True, False, False),
    ],
)
def test_what_an_index_knows(
    entries: list[int], available: int, existing: int, prefix: bool, identity: bool, has_new: bool
) -> None:
    index = Index(entries, available)
    assert (index.existing, index.is_prefix, index.is_identity, index.has_new) == (existing, prefix, identity, has_new)


def test_rows_of_an_index() -> None:
    index = Index([0, 1, 2, NEW], 3)
    assert index.rows(1, 3).entries == [1, 2] and not index.rows(1, 3).is_prefix
    assert index.rows(2, 4).entries == [2, NEW] and index.rows(2, 4).has_new


@pytest.mark.parametrize(("family", "name"), [("llama", "model.norm.weight"), ("gpt2", "transformer.ln_f.weight")])
def test_gains_are_scaled(family: str, name: str) -> None:
    config = tiny_config(family)
    layout = get_family(config)
    shape = shape_of(config, layout)
    wide = replace(shape, hidden=4 * shape.hidden)
    gain = torch.randn(shape.hidden)
    result = resize(gain, layout.spec(name), WidthMap(layout, shape, wide))
    torch.testing.assert_close(result[: shape.hidden], gain / 2)
    torch.testing.assert_close(result[shape.hidden :], (gain.mean() / 2).expand(3 * shape.hidden))
    torch.testing.assert_close(resize(result, layout.spec(name), WidthMap(layout, wide, shape)), gain)
    assert resized_eps(1e-5, shape, wide) == pytest.approx(0.25e-5)


def test_layernorm_writers_are_padded_with_their_mean() -> None:
    config = tiny_config("gpt2")
    layout = get_family(config)
    shape = shape_of(config, layout)
    rows = torch.randn(shape.vocab, shape.hidden)
    wide = resize(rows, layout.spec("transformer.wte.weight"), WidthMap(layout, shape, replace(shape, hidden=40)))
    torch.testing.assert_close(wide[:, 32:], rows.mean(1, keepdim=True).expand(-1, 8))
    torch.testing.assert_close(wide.mean(1), rows.mean(1))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fill_touches_only_free_new_coordinates(family: str) -> None:
    config = tiny_config(family)
    layout, model = get_family(config), random_model(config)
    source, target = shape_of(config, layout), grown(config)
    widths = WidthMap(layout, source, target)
    filled_names = set()
    for name, parameter in model.named_parameters():
        spec, tensor = layout.spec(name), parameter.detach()
        plain = resize(tensor, spec, widths)
        fill = torch.full(plain.shape, 7.0)
        filled = resize(tensor, spec, widths, fill=fill)
        new = torch.zeros(plain.shape, dtype=torch.bool)
        for dim, axis in enumerate(spec.axes):
            index = torch.tensor(widths.index(axis, 0, tensor.shape[dim]).entries)
            new |= (index == NEW).view([-1 if d == dim else 1 for d in range(new.ndim)])
        assert torch.equal(filled[~new], plain[~new]), name
        if torch.equal(filled, plain):
            continue
        filled_names.add(layout.split(name)[1])
        assert bool((filled[new] == 7).all()), name
    assert filled_names == {
        local for local, spec in layout.tensors.items() if spec.free and not all(axis.is_fixed for axis in spec.axes)
    }
    assert len(filled_names) >= 6


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("layers", [0, 2])
def test_fill_keeps_the_function(family: str, layers: int, tmp_path: Path) -> None:
    model = random_model(tiny_config(family))
    target = grown(model.config, layers)
    plain = transform(model, target, tmp_path / "plain")
    result = transform(model, target, tmp_path / "filled", fill_seed=1)
    changed = [n for n, value in result.named_parameters() if not torch.equal(value, plain.get_parameter(n))]
    assert len(changed) > 10
    expected = logits(model)
    torch.testing.assert_close(logits(result), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_same_width_returns_the_tensor_itself() -> None:
    config = tiny_config("llama")
    layout = get_family(config)
    shape = shape_of(config, layout)
    tensor = torch.randn(shape.ffn, shape.hidden)
    spec = layout.spec("model.layers.0.mlp.up_proj.weight")
    assert resize(tensor, spec, WidthMap(layout, shape, replace(shape, layers=9))) is tensor


def test_resizing_leaves_its_input_alone() -> None:
    config = tiny_config("gpt2")
    layout = get_family(config)
    shape = shape_of(config, layout)
    for name, parameter in random_model(config).named_parameters():
        before = parameter.detach().clone()
        resize(parameter.detach(), layout.spec(name), WidthMap(layout, shape, grown(config)))
        assert torch.equal(parameter.detach(), before), name


def test_a_selection_chooses_the_coordinates() -> None:
    config = tiny_config("llama", heads=4)
    layout = get_family(config)
    shape = shape_of(config, layout)
    small = replace(shape, hidden=16, heads=2, kv_heads=1, ffn=64)
    widths = WidthMap(layout, shape, small, Stride())
    name = "model.layers.1.self_attn.q_proj.weight"
    tensor = torch.randn(32, 32)
    expected = tensor[:16, ::2]
    assert torch.equal(resize(tensor, layout.spec(name), widths, 1), expected)
    up = torch.randn(128, 32)
    assert torch.equal(resize(up, layout.spec("model.layers.1.mlp.up_proj.weight"), widths, 1), up[::2, ::2])
    # Gains keep the norm's statistics as if the dropped channels had been neutral.
    gain = torch.randn(32)
    torch.testing.assert_close(resize(gain, layout.spec("model.norm.weight"), widths), gain[::2] * 2**0.5)


@pytest.mark.parametrize("selection", [First(), Stride()], ids=["first", "stride"])
def test_growing_takes_no_selection(selection: First | Stride) -> None:
    config = tiny_config("llama")
    layout = get_family(config)
    shape = shape_of(config, layout)
    widths = WidthMap(layout, shape, grown(config), selection)
    axis = layout.spec("model.embed_tokens.weight").axes[1]
    index = widths.index(axis, None, shape.hidden)
    assert index.entries[:32] == list(range(32)) and set(index.entries[32:]) == {NEW}


class TestClone:
    """HyperCloning: copies beside the originals, whose readers share the weight."""

    def test_needs_a_multiple(self) -> None:
        layout = get_family(tiny_config("llama"))
        shape = shape_of(tiny_config("llama"), layout)
        with pytest.raises(ValueError, match="multiple of 32, got 48"):
            WidthMap(layout, shape, replace(shape, hidden=48, heads=6, kv_heads=3), growth="clone")

    def test_writers_repeat_and_readers_share(self) -> None:
        layout = get_family(tiny_config("llama"))
        shape = shape_of(tiny_config("llama"), layout)
        widths = WidthMap(layout, shape, replace(shape, hidden=64, ffn=192), growth="clone")
        up, down = torch.randn(128, 32), torch.randn(32, 128)
        wide = resize(up, layout.spec("model.layers.0.mlp.up_proj.weight"), widths, 0)
        torch.testing.assert_close(wide, torch.cat([up, up[:64]]).repeat(1, 2) / 2)
        wide = resize(down, layout.spec("model.layers.0.mlp.down_proj.weight"), widths, 0)
        copies = torch.cat([torch.full((64,), 2.0), torch.ones(64), torch.full((64,), 2.0)])
        torch.testing.assert_close(wide, torch.cat([down, down[:, :64]], 1).repeat(2, 1) / copies)
        gain = torch.randn(32)
        torch.testing.assert_close(
            resize(gain, layout.spec("model.layers.0.input_layernorm.weight"), widths, 0), gain.repeat(2)
        )
        # The tied head sees every channel twice.
        torch.testing.assert_close(resize(gain, layout.spec("model.norm.weight"), widths), gain.repeat(2) / 2)
