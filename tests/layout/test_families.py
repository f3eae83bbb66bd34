"""The declared layouts cover exactly the parameters of the real models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from cbd_hf.layout import (
    FAMILIES,
    Shape,
    check_same_family,
    config_with_shape,
    count_parameters,
    get_family,
    meta_model,
    parameter_shapes,
    shape_of,
)

from ..models import FAMILY_NAMES, tiny_config


# head_dim 6 beside hidden 32, so that no two dimensions of a Llama-like model have one size.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),
    ("gpt2", {"n_inner": 77}),
    ("gpt2", {"tie_word_embeddings": False}),
    *(
        (family, {"tie_word_embeddings": tied, "head_dim": 6, "hidden_size": 32, "intermediate_size": 77})
        for family in FAMILY_NAMES[1:]
        for tied in (True, False)
    ),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"num_key_value_heads": 4}),
    ("qwen3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_every_parameter_is_declared(family: str, options: dict[str, Any]) -> None:
    config = tiny_config(family, **options)
    layout = get_family(config)
    shape = shape_of(config, layout)
    shapes = parameter_shapes(config)
    for name, actual in shapes.items():
        axes = layout.spec(name).axes
        assert tuple(sum(shape.size_of(role) for role in axis.roles) for axis in axes) == actual, name
        assert layout.join(*layout.split(name)) == name
    layers = {layout.split(name)[0] for name in shapes} - {None}
    assert layers == set(range(shape.layers))


@pytest.mark.parametrize("layout", FAMILIES, ids=lambda layout: layout.model_types[0])
def test_nothing_is_declared_that_no_model_has(layout: Any) -> None:
    found = {
        layout.split(name)[1]
        for family, options in VARIANTS
        if (config := tiny_config(family, **options)).model_type in layout.model_types
        for name in parameter_shapes(config)
    }
    assert found == set(layout.tensors)


def test_every_declared_model_type_is_tested() -> None:
    tested = {tiny_config(family).model_type for family in FAMILY_NAMES}
    assert tested == {kind for layout in FAMILIES for kind in layout.model_types}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_stream_and_norms(family: str) -> None:
    """What is said beside the axes: gains are the norms of the stream, block outputs write to it."""
    config = tiny_config(family, hidden_size=48) if family != "gpt2" else tiny_config(family)
    layout = get_family(config)
    for name in parameter_shapes(config):
        spec = layout.spec(name)
        is_gain = name.endswith("weight") and ("layernorm" in name or ".ln_" in name or name == "model.norm.weight")
        assert spec.norm_gain == is_gain, name
        is_output = any(part in name for part in ("o_proj", "down_proj", "c_proj"))
        assert spec.block_output == is_output, name
        embeds = any(part in name for part in ("embed_tokens", "wte", "wpe"))
        assert spec.writes_stream == (is_output or embeds), name


def test_unknown_parameter() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.router\.weight is not in the declared layout of llama"):
        get_family(tiny_config("llama")).spec("model.layers.0.router.weight")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "'bert' is not supported yet; supported: gpt2, llama"),
        (tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (tiny_config("gpt2", add_cross_attention=True), "add_cross_attention=True"),
    ],
)
def test_unsupported(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_family(config)


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
    config = tiny_config("gpt2", n_inner=128)
    assert config.n_embd * 4 == 128
    layout = get_family(config)
    assert config_with_shape(config, shape_of(config, layout), layout).n_inner is None
    odd = replace(shape_of(config, layout), ffn=100)
    assert config_with_shape(config, odd, layout).n_inner == 100


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("qwen3", layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=8),
        Qwen2Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=2, sliding_window=8),
    ],
)
def test_mixed_layers_are_refused(config: Qwen2Config | Qwen3Config) -> None:
    layout = get_family(config)
    with pytest.raises(ValueError, match="mixes layer types"):
        config_with_shape(config, shape_of(config, layout), layout)


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", False),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("vocab_size", 80),
    ],
)
def test_configs_of_other_functions_do_not_mix(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"must agree in {field}"):
        check_same_family(tiny_config("llama"), tiny_config("llama", **{field: value}))


def test_sliding_windows_do_not_mix() -> None:
    with pytest.raises(ValueError, match="must agree in sliding_window, got 8 and 16"):
        check_same_family(MistralConfig(sliding_window=8), MistralConfig(sliding_window=16))


def test_models_are_built_without_weights() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    assert {parameter.device.type for parameter in meta_model(config).parameters()} == {"meta"}
    assert config.to_dict() == before
