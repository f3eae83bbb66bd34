"""Layouts are learned from the architecture itself, and refused where they are not understood."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from cbd_hf.families import get_family, learn, packings, store
from cbd_hf.families.packings import PACKINGS, Measured
from cbd_hf.families.proof import TOLERANCE
from cbd_hf.layout import LayoutError, Segment, parameter_shapes, shape_of, weight_shapes

from ..models import FAMILY_NAMES, tiny_config
from .configs import CASES, TOKENS, family_config


# The package exports a function of the module's name.
LEARN = importlib.import_module("cbd_hf.families.learn")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known yet, and what is learned is forgotten."""
    monkeypatch.setattr(LEARN, "_KNOWN", {})


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
CONFIGS = [tiny_config(family, **options) for family, options in VARIANTS] + [family_config(name) for name in CASES]


@pytest.mark.parametrize("config", CONFIGS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(VARIANTS)] + list(CASES))
def test_every_parameter_is_explained(config: PretrainedConfig) -> None:
    """Of the config itself, whose sizes are others than those of the small model it was learned on."""
    layout, proof = learn(config)
    assert proof.largest <= TOLERANCE and set(proof.errors) == {"ffn", "width", "depth", "order"}
    assert layout.model_type == config.model_type
    shape = shape_of(config, layout)
    shapes = weight_shapes(config)
    for name, actual in shapes.items():
        for axis, length in zip(layout.spec(name).axes, actual, strict=True):
            assert axis.is_fixed or shape.length(axis) == length, name
        assert layout.join(*layout.split(name)) == name
    assert {layout.split(name)[0] for name in shapes} - {None} == set(range(shape.layers))
    assert {layout.split(name)[1] for name in shapes} == set(layout.tensors)
    groups = {layout.group(name) for name in shapes}
    assert groups | {"norms"} == {"embeddings", "attention", "ffn", "norms"}  # some norms have no weights


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


@pytest.mark.parametrize(
    ("name", "parameter", "dim", "segments"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn.weight", 1, (Segment("query", 8),) * 3),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", 0, (Segment("query", 24),)),
        ("bloom", "transformer.h.0.self_attention.query_key_value.bias", 0, (Segment("query", 24),)),
        (
            "falcon-multi_query",
            "transformer.h.0.self_attention.query_key_value.weight",
            0,
            (Segment("query", 8), Segment("fixed", 8), Segment("fixed", 8)),
        ),
        ("falcon-new", "transformer.h.0.self_attention.query_key_value.weight", 0, (Segment("group", 8),)),
        ("falcon-alibi", "transformer.h.0.self_attention.query_key_value.weight", 0, (Segment("query", 24),)),
        (
            "phi3",
            "model.layers.0.self_attn.qkv_proj.weight",
            0,
            (Segment("query", 8), Segment("key_value", 8), Segment("key_value", 8)),
        ),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight", 0, (Segment("ffn"), Segment("ffn"))),
        (
            "qwen3_moe",
            "model.layers.0.mlp.experts.gate_up_proj",
            1,
            (Segment("ffn:moe_intermediate_size"), Segment("ffn:moe_intermediate_size")),
        ),
        ("llama-head_dim", "model.layers.0.self_attn.k_proj.weight", 0, (Segment("key_value", 6),)),
    ],
)
def test_packings_are_found(name: str, parameter: str, dim: int, segments: tuple[Segment, ...]) -> None:
    assert get_family(family_config(name)).spec(parameter).axes[dim].segments == segments


@pytest.mark.parametrize(
    ("name", "parameter", "kind", "role", "offset", "flags"),
    [
        ("llama", "model.norm.weight", "rms", "hidden", 0.0, "before_tied_head"),
        ("llama-head_dim", "model.norm.weight", "rms", "hidden", 0.0, ""),
        ("gpt2", "transformer.ln_f.weight", "layer", "hidden", 0.0, "before_tied_head"),
        ("gemma", "model.layers.0.input_layernorm.weight", "rms", "hidden", 1.0, ""),
        ("bloom", "transformer.word_embeddings_layernorm.weight", "layer", "hidden", 0.0, "writes_stream"),
        ("olmo2", "model.layers.0.self_attn.q_norm.weight", "rms", "query", 0.0, ""),
        ("olmo2", "model.layers.0.self_attn.k_norm.weight", "rms", "key_value", 0.0, ""),
        ("cohere", "model.layers.0.input_layernorm.weight", "layer", "hidden", 0.0, ""),
    ],
)
def test_norms_are_found(name: str, parameter: str, kind: str, role: str, offset: float, flags: str) -> None:
    norm = get_family(family_config(name)).spec(parameter).norm
    assert norm is not None
    assert (norm.kind, norm.role, norm.offset) == (kind, role, offset)
    assert norm.writes_stream == (flags == "writes_stream")
    assert norm.before_tied_head == (flags == "before_tied_head")


def test_facts_beside_the_tensors() -> None:
    assert get_family(family_config("bloom")).alibi == get_family(family_config("falcon-alibi")).alibi == "bloom"
    assert get_family(family_config("falcon-new")).alibi is None
    embedding = "model.embed_tokens.weight"
    assert get_family(family_config("gemma2")).spec(embedding).width_power == 0.5  # scaled by sqrt(hidden)
    assert get_family(family_config("llama")).spec(embedding).width_power == 0
    assert get_family(family_config("opt")).follows_hidden == ("word_embed_proj_dim",)
    assert get_family(family_config("qwen3_moe")).inert == ("intermediate_size",)
    assert not get_family(family_config("qwen3_moe-dense")).uniform


def test_a_layout_is_learned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama")
    family = get_family(config)
    monkeypatch.setattr(LEARN, "_learn", lambda small: pytest.fail("learned again"))
    assert get_family(tiny_config("llama")) is family
    # Another size of the same structure has the same miniature.
    assert get_family(tiny_config("llama", layers=9, heads=8)) is family


@pytest.mark.usefixtures("fresh")
def test_learning_leaves_no_trace() -> None:
    config = tiny_config("llama")
    before, state = config.to_dict(), torch.get_rng_state()
    get_family(config)
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), state)


def test_unknown_parameter() -> None:
    with pytest.raises(LayoutError, match=r"model\.layers\.0\.router\.weight is not in the layout of llama"):
        get_family(tiny_config("llama")).spec("model.layers.0.router.weight")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), "^bert"),
        (tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True), "inserted layers .* computes something else"),
        # The input norm's output is the residual stream, with a gain that differs by channel.
        (family_config("bloom", apply_residual_connection_post_layernorm=True), "more heads or a wider stream"),
        # One norm for every head, so the set of parameters follows the heads.
        (family_config("stablelm", qk_layernorm=True), "do not follow hidden_size, num_attention_heads evenly"),
        (CONFIG_MAPPING["gemma3"](), "multimodal; use its text config"),
    ],
    ids=["bert", "gpt2", "bloom", "stablelm", "gemma3"],
)
def test_refused(config: PretrainedConfig, message: str) -> None:
    for _ in range(2):  # also from the cache
        with pytest.raises(LayoutError, match=message):
            get_family(config)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("name", "kept", "module"),
    [
        # Of the two orders whose sizes fit, only the wrong one is left.
        ("phi3", "grouped", "self_attn.qkv_proj"),
        ("falcon-new", "query|key|value", "self_attention.query_key_value"),
        ("gpt_neox", "query|key|value", "attention.query_key_value"),
        ("phi3", "interleaved", "mlp.gate_up_proj"),
    ],
)
def test_a_wrong_packing_is_refused(name: str, kept: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes fit, so that only the function can tell."""
    others = {"interleaved": ("blocks",)}.get(kept, ("query|key|value", "grouped", "blocks"))
    for key in (*others, *(("plain",) if name == "gpt_neox" else ())):
        if key != kept and key != "plain":
            monkeypatch.delitem(packings.PACKINGS, key)
    if name == "gpt_neox":
        plain = PACKINGS["plain"]
        fused = lambda axis: None if axis.per.get("query", 0) > axis.head_dim else plain(axis)  # noqa: E731
        monkeypatch.setitem(packings.PACKINGS, "plain", fused)
    with pytest.raises(LayoutError, match="cannot be resized exactly") as caught:
        get_family(family_config(name))
    assert module in str(caught.value)
    assert "PACKINGS of cbd_hf/families/packings.py" in str(caught.value)


class CustomConfig(LlamaConfig):
    """A Llama with a twist that `twist` names; registered for the tests."""

    model_type = "cbd-test-llama"

    def __init__(self, twist: str = "none", **options: Any) -> None:
        self.twist = twist
        super().__init__(**options)


class ValueKeyQuery(torch.nn.Module):
    """Fused v | k | q, an order that no architecture has."""

    def __init__(self, config: CustomConfig, base: torch.nn.Module) -> None:
        super().__init__()
        self.sizes = [base.v_proj.out_features, base.k_proj.out_features, base.q_proj.out_features]
        self.fused = torch.nn.Linear(config.hidden_size, sum(self.sizes), bias=False)

    def parts(self, states: torch.Tensor) -> list[torch.Tensor]:
        return list(self.fused(states).split(self.sizes, -1))


class Part(torch.nn.Module):
    """One of its outputs in the place of a projection; owns nothing."""

    def __init__(self, fused: ValueKeyQuery, index: int) -> None:
        super().__init__()
        self.owner = [fused]
        self.index = index

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.owner[0].parts(states)[self.index]


class MaxNorm(torch.nn.Module):
    """Divides by the largest entry: scale-free like a norm, but not by its statistics."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states / states.abs().amax(-1, keepdim=True)


class MeanAbsNorm(MaxNorm):
    """Divides by the mean of the magnitudes, which new channels dilute by d/D and not by its root."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states / states.abs().mean(-1, keepdim=True)


class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig

    def __init__(self, config: CustomConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            attention = layer.self_attn
            if config.twist == "fused":
                attention.qkv = ValueKeyQuery(config, attention)
                for index, name in enumerate(("v_proj", "k_proj", "q_proj")):
                    setattr(attention, name, Part(attention.qkv, index))
            elif config.twist == "odd size":
                attention.extra = torch.nn.Linear(config.hidden_size, 3 * config.num_attention_heads + 5, bias=False)
            elif config.twist in ("max norm", "mean norm"):
                norm = MaxNorm if config.twist == "max norm" else MeanAbsNorm
                layer.input_layernorm = norm(config.hidden_size)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.config.twist == "scaled":
            output.logits = output.logits * self.config.hidden_size
        elif self.config.twist == "scaled by a constant":
            output.logits = output.logits * 7.3
        return output


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    AutoConfig.register(CustomConfig.model_type, CustomConfig)
    AutoModelForCausalLM.register(CustomConfig, CustomForCausalLM)
    yield
    CONFIG_MAPPING._extra_content.pop(CustomConfig.model_type)
    AutoModelForCausalLM._model_mapping._extra_content.pop(CustomConfig)


def custom(twist: str) -> CustomConfig:
    values = tiny_config("llama", heads=6, num_key_value_heads=3).to_dict() | TOKENS
    values.pop("model_type")
    return CustomConfig(twist, **values)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("twist", ["none", "scaled by a constant", "max norm"])
def test_an_architecture_of_ones_own(twist: str) -> None:
    """Without a word about it in this package; also with a norm whose statistics new channels do not dilute."""
    assert get_family(custom(twist)).model_type == CustomConfig.model_type


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("twist", "message"),
    [
        ("scaled", "more heads or a wider stream a small random model of it computes something else"),
        ("mean norm", "cannot be resized exactly|cannot be examined"),
        ("odd size", r"axis 0 of model\.layers\.0\.self_attn\.extra\.weight has 3 per query and 5 further entries"),
    ],
)
def test_what_is_not_understood_is_refused(twist: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        get_family(custom(twist))


@pytest.mark.usefixtures("fresh")
def test_declaring_a_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry in the table is all that a new order needs."""
    with pytest.raises(LayoutError, match=r"self_attn\.qkv\.fused; declare it in PACKINGS of cbd_hf/families/packing"):
        get_family(custom("fused"))

    def value_key_query(axis: Measured) -> tuple[Segment, ...] | None:
        hd = axis.head_dim
        if axis.per != {"query": hd, "key_value": 2 * hd} or axis.rest:
            return None
        return Segment("key_value", hd), Segment("key_value", hd), Segment("query", hd)

    monkeypatch.setitem(packings.PACKINGS, "value|key|query", value_key_query)
    monkeypatch.setattr(LEARN, "_KNOWN", {})
    family, proof = learn(custom("fused"))
    roles = family.spec("model.layers.1.self_attn.qkv.fused.weight").axes[0].roles
    assert roles == ("key_value", "key_value", "query") and proof.largest < TOLERANCE


@pytest.mark.usefixtures("fresh")
def test_no_known_packing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the tensor, its sizes and the place to declare them in."""
    for name in ("query|key|value", "grouped"):
        monkeypatch.delitem(packings.PACKINGS, name)
    with pytest.raises(LayoutError) as caught:
        get_family(custom("fused"))
    said = str(caught.value)
    assert "axis 0 of model.layers.0.self_attn.qkv.fused.weight has 8 per query, 16 per key_value" in said
    assert "Declare it in PACKINGS of cbd_hf/families/packings.py" in said


def test_packings_each_fit_what_they_say() -> None:
    def found(per: dict[str, int], rest: int = 0, grouped: bool = True) -> dict[str, tuple[Segment, ...]]:
        axis = Measured(per, rest, 8, grouped)
        answers = {name: packing(axis) for name, packing in PACKINGS.items()}
        return {name: segments for name, segments in answers.items() if segments is not None}

    query, key_value = Segment("query", 8), Segment("key_value", 8)
    (whole,) = found({}, 7)["plain"]  # whatever its length
    assert whole.role == "fixed"
    assert found({"hidden": 1}) == {"plain": (Segment("hidden"),)}
    assert found({"query": 24}, grouped=False) == {
        "plain": (Segment("query", 24),),
        "query|key|value": (query,) * 3,
    }
    assert found({"query": 8, "key_value": 16}) == {
        "query|key|value": (query, key_value, key_value),
        "grouped": (Segment("group", 8),),
    }
    assert found({"query": 8}, 16)["query|key|value"] == (query, Segment("fixed", 8), Segment("fixed", 8))
    assert found({"ffn": 2}) == {"blocks": (Segment("ffn"),) * 2, "interleaved": (Segment("ffn", 2),)}
    assert found({"key_value": 16}) == {"plain": (Segment("key_value", 16),), "blocks": (key_value,) * 2}
    assert found({"hidden": 1, "ffn": 1}) == {} and found({"ffn": 1}, 3) == {}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_learning_under_the_callers_settings(context: Callable[[], Any]) -> None:
    """The proof needs gradients and real tensors, whatever the caller has switched off."""
    with context():
        family = get_family(family_config("llama"))
    assert family.model_type == "llama"


@pytest.mark.usefixtures("fresh")
def test_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts of transformers' classes; not of classes whose code may change between two runs."""
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    config = family_config("llama")
    learned = learn(config)
    (path,) = tmp_path.iterdir()
    assert store.load(config) == (learned[0], learned[1].errors)
    path.write_text("{")  # damaged: learned again
    assert store.load(config) is None
    get_family(custom("none"))
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setenv(store.VARIABLE, "off")
    assert store.load(config) is None


@pytest.mark.usefixtures("fresh")
def test_fused_cross_attention_is_refused() -> None:
    """A causal LM never runs it, so nothing tells in which order k and v lie."""
    with pytest.raises(LayoutError, match=r"crossattention\.c_attn\.weight.* cannot be checked"):
        get_family(family_config("gpt2", add_cross_attention=True))
