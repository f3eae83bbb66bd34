"""A model's dimensions, read from its config and written back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen3Config

from cbd_hf.families import get_family
from cbd_hf.layout import (
    Axis,
    LayoutError,
    Segment,
    Shape,
    config_with_shape,
    count_parameters,
    layer_kinds,
    meta_model,
    per_layer_lists,
    shape_of,
)

from ..families.configs import CASES, family_config
from ..models import FAMILY_NAMES, tiny_config


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_own_shape_changes_nothing(family: str) -> None:
    config = tiny_config(family)
    copy = config_with_shape(config, shape_of(config, get_family(config)), get_family(config))
    assert copy is not config and type(copy) is type(config)
    volatile = ("transformers_version", "architectures", "_name_or_path")
    before, after = ({k: v for k, v in c.to_dict().items() if k not in volatile} for c in (config, copy))
    assert before == after


@pytest.mark.parametrize("family", FAMILY_NAMES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    layers=st.integers(1, 6),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    ffn=st.integers(1, 99),
    data=st.data(),
)
def test_round_trip(family: str, layers: int, kv_heads: int, group: int, ffn: int, data: st.DataObject) -> None:
    config = tiny_config(family)
    layout = get_family(config)
    if layout.heads_fill_hidden:
        kv_heads, group = kv_heads * group, 1
    heads = kv_heads * group
    # transformers wants the hidden size to be a multiple of the heads.
    hidden = heads * (8 if layout.heads_fill_hidden else 2 * data.draw(st.integers(1, 6)))
    old = shape_of(config, layout)
    wanted = replace(old, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn)
    result = config_with_shape(config, wanted, layout)
    assert shape_of(result, layout) == wanted
    again = type(result).from_dict(result.to_dict())
    assert shape_of(again, layout) == wanted
    assert count_parameters(result) == sum(p.numel() for p in meta_model(again).parameters())
    assert shape_of(config, layout) == old


def test_gpt2_writes_its_usual_ffn_as_none() -> None:
    """Where the config does so; a width that is written out stays so."""
    config = tiny_config("gpt2")
    assert config.n_inner is None
    layout = get_family(config)
    shape = shape_of(config, layout)
    assert shape.ffn == 128
    assert config_with_shape(config, shape, layout).n_inner is None
    assert config_with_shape(config, replace(shape, hidden=40, heads=5, kv_heads=5, ffn=160), layout).n_inner is None
    assert config_with_shape(config, replace(shape, ffn=100), layout).n_inner == 100
    written = tiny_config("gpt2", n_inner=128)
    layout = get_family(written)
    assert config_with_shape(written, shape_of(written, layout), layout).n_inner == 128


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(
            "qwen3",
            layers=2,
            layer_types=["sliding_attention", "full_attention"],
            use_sliding_window=True,
            sliding_window=8,
        ),
        Qwen2Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=2, sliding_window=8),
    ],
)
def test_mixed_layers_are_refused(config: Qwen2Config | Qwen3Config) -> None:
    layout = get_family(config)
    with pytest.raises(ValueError, match="mixes kinds of layers"):
        config_with_shape(config, replace(shape_of(config, layout), layers=5), layout)
    same = config_with_shape(config, shape_of(config, layout), layout)
    assert same.layer_types == config.layer_types


def test_mixed_layers_follow_those_that_are_named() -> None:
    config = tiny_config("qwen3", layers=3, use_sliding_window=True, sliding_window=8)
    config.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    layout = get_family(config)
    wanted = replace(shape_of(config, layout), layers=4)
    result = config_with_shape(config, wanted, layout, layers=[0, 0, 2, 1])
    assert result.layer_types == ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    assert shape_of(result, layout) == wanted
    with pytest.raises(LayoutError, match="2 layers are named for a shape of 4"):
        config_with_shape(config, wanted, layout, layers=[0, 1])


@pytest.mark.parametrize("layers", [1, 5])
def test_uniform_layer_types_follow_the_depth(layers: int) -> None:
    config = tiny_config("qwen3", layers=3)
    layout = get_family(config)
    result = config_with_shape(config, replace(shape_of(config, layout), layers=layers), layout)
    assert result.layer_types == ["full_attention"] * layers


def test_impossible_shapes() -> None:
    config = tiny_config("gpt2")
    shape = shape_of(config, get_family(config))
    with pytest.raises(ValueError, match="hidden size = heads x head_dim, got 40 and 4 x 8"):
        config_with_shape(config, replace(shape, hidden=40), get_family(config))
    with pytest.raises(ValueError, match="3 query heads cannot be shared evenly by 2"):
        Shape(layers=1, hidden=24, heads=3, kv_heads=2, head_dim=8, ffn=8, vocab=8)


@pytest.mark.parametrize("name", CASES)
def test_own_shape_changes_nothing_in_any_family(name: str) -> None:
    """Also what is derived (FFN widths, head dimensions) stays as the config writes it."""
    config = family_config(name)
    layout = get_family(config)
    volatile = ("transformers_version", "architectures", "_name_or_path")
    copy = config_with_shape(config, shape_of(config, layout), layout)
    before, after = ({k: v for k, v in c.to_dict().items() if k not in volatile} for c in (config, copy))
    assert before == after


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", 1),
        ("gemma2", 2),
        ("smollm3", 2),
        ("smollm3-windows", 3),  # rotary and sliding, rotary and full, neither and sliding
        ("qwen3_moe", 1),
        ("qwen3_moe-dense", 2),  # told by the names of the parameters, not by a list of the config
    ],
)
def test_kinds_of_layers(name: str, kinds: int) -> None:
    config = family_config(name)
    found = layer_kinds(config, get_family(config))
    assert len(found) == 3 and len(set(found)) == kinds


def test_lists_by_layer() -> None:
    config = tiny_config("gpt2", layers=2, eos_token_id=[1, 2])
    assert per_layer_lists(config, 2) == {}  # tokens, classes and labels are none
    config = family_config("smollm3-windows")
    assert set(per_layer_lists(config, 3)) == {"layer_types", "no_rope_layers"}


def test_sizes() -> None:
    shape = Shape(
        layers=1, hidden=12, heads=6, kv_heads=2, head_dim=4, ffn=7, vocab=9, extra=(("ffn:moe_intermediate_size", 5),)
    )
    assert shape.group == 3
    assert shape.widths == {"hidden": 12, "heads": 6, "kv_heads": 2, "ffn": 7, "ffn:moe_intermediate_size": 5}
    sizes = {"hidden": 12, "query": 24, "key_value": 8, "group": 2 * (3 + 2) * 4, "fixed": 4, "ffn": 28}
    for role, size in (sizes | {"ffn:moe_intermediate_size": 20}).items():
        assert shape.size_of(Segment(role, 12 // 12 if role == "hidden" else 4)) == size, role
    assert shape.length(Axis((Segment("query", 4), Segment("key_value", 4), Segment("fixed", 3)), "out")) == 24 + 8 + 3


def test_derived_widths_are_kept() -> None:
    """BLOOM's FFN has no attribute; Falcon's heads fill the hidden size."""
    config = family_config("bloom")
    layout = get_family(config)
    shape = shape_of(config, layout)
    assert (shape.hidden, shape.ffn, layout.ffn_per_hidden) == (32, 128, 4)
    with pytest.raises(LayoutError, match="bloom has 4 FFN units per channel, got 100 and 32"):
        config_with_shape(config, replace(shape, ffn=100), layout)
    with pytest.raises(LayoutError, match="bloom needs hidden size = heads x head_dim, got 48 and 4 x 8"):
        config_with_shape(config, replace(shape, hidden=48, ffn=192), layout)
    wide = replace(shape, hidden=64, heads=8, kv_heads=8, ffn=256)
    assert shape_of(config_with_shape(config, wide, layout), layout) == wide


def test_multi_query_has_one_key_value_head() -> None:
    """Falcon's attribute names as many as there are queries, which no parameter follows."""
    config = family_config("falcon-alibi")
    layout = get_family(config)
    shape = shape_of(config, layout)
    assert (shape.heads, shape.kv_heads) == (4, 4)
    wide = config_with_shape(config, replace(shape, hidden=64, heads=8, kv_heads=8), layout)
    assert (wide.num_attention_heads, wide.num_kv_heads) == (8, 8)
