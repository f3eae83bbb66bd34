"""The three invariants of Trans (DESIGN section 3), for every family, on shapes drawn at random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig

from cbd_hf.checkpoint import CheckpointError, CheckpointReader
from cbd_hf.families import get_family
from cbd_hf.layout import Shape, meta_model, shape_of, weights_of
from cbd_hf.transforms import First, LayerMap, StateDict, Stride, Trans, align_layers

from ..models import FAMILY_NAMES, logits, random_model, tiny_config, transform


PROPERTY = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def wider(config: PretrainedConfig, kv_heads: int, layers: int, extra_ffn: int = 0) -> Shape:
    family = get_family(config)
    shape = shape_of(config, family)
    heads = (shape.kv_heads + kv_heads) * shape.group
    hidden = shape.hidden // shape.heads * heads
    return replace(
        shape,
        layers=shape.layers + layers,
        hidden=hidden,
        heads=heads,
        kv_heads=shape.kv_heads + kv_heads,
        ffn=4 * hidden + extra_ffn,
    )


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_identity_is_bit_exact(family: str, tmp_path: Path) -> None:
    model = random_model(tiny_config(family))
    shape = shape_of(model.config, get_family(model.config))
    result = transform(model, shape, tmp_path)
    before, after = model.state_dict(), result.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@PROPERTY
@given(layers=st.integers(0, 3), kv_heads=st.integers(0, 2), extra_ffn=st.integers(0, 5), seed=st.integers(0, 100))
def test_expansion_preserves_the_function(
    family: str, layers: int, kv_heads: int, extra_ffn: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = random_model(tiny_config(family), seed)
    target = wider(model.config, kv_heads, layers, extra_ffn)
    result = transform(model, target, tmp_path_factory.mktemp("anchor"))
    expected, actual = logits(model), logits(result)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("family", FAMILY_NAMES)
@PROPERTY
@given(layers=st.integers(0, 3), kv_heads=st.integers(0, 2), seed=st.integers(0, 100))
def test_subset_undoes_expansion(
    family: str, layers: int, kv_heads: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A model whose dropped coordinates are neutral (made so by expansion) is restored by subset then expansion."""
    small = random_model(tiny_config(family), seed)
    shape = shape_of(small.config, get_family(small.config))
    target = wider(small.config, kv_heads, layers)
    wide = transform(small, target, tmp_path_factory.mktemp("small"))
    kept = align_layers(shape.layers, target.layers, shape.layers)[1]
    back = transform(wide, shape, tmp_path_factory.mktemp("wide"), kept)
    again = transform(back, target, tmp_path_factory.mktemp("back"))
    for name, tensor in wide.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_function_depends_on_whole_heads(family: str, tmp_path: Path) -> None:
    """A subset keeps whole heads: the attention weights of the kept heads are those of the large model."""
    large = random_model(tiny_config(family, heads=6))
    shape = shape_of(large.config, get_family(large.config))
    target = replace(shape, heads=4, kv_heads=4 // shape.group, hidden=shape.hidden // 6 * 4)
    small = transform(large, target, tmp_path)
    if family == "gpt2":
        old = large.transformer.h[0].attn.c_attn.weight.view(shape.hidden, 3, 6, 8)
        new = small.transformer.h[0].attn.c_attn.weight.view(target.hidden, 3, 4, 8)
        assert torch.equal(new, old[: target.hidden, :, :4])
    else:
        old = large.model.layers[0].self_attn.q_proj.weight.view(6, 8, shape.hidden)
        new = small.model.layers[0].self_attn.q_proj.weight.view(4, 8, target.hidden)
        assert torch.equal(new, old[:4, :, : target.hidden])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_replication_changes_the_function(family: str, tmp_path: Path) -> None:
    model = random_model(tiny_config(family))
    shape = shape_of(model.config, get_family(model.config))
    result = transform(model, replace(shape, layers=5), tmp_path, expansion="replicate")
    assert not torch.allclose(logits(result), logits(model), rtol=1e-2)


def test_shape_mismatch_names_the_tensor(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    model.save_pretrained(tmp_path)
    family = get_family(model.config)
    wrong = replace(shape_of(model.config, family), ffn=64)
    with CheckpointReader(tmp_path, model=meta_model(model.config)) as reader:
        trans = Trans(reader, family, wrong, wrong, LayerMap((0, 1, 2), (False,) * 3))
        wide = random_model(tiny_config("llama", intermediate_size=64))
        with pytest.raises(
            ValueError, match=r"gate_proj.weight in .* has shape \(128, 32\), but its config says \(64, 32\)"
        ):
            trans.check(weights_of(wide))


def test_layers_that_the_checkpoint_lacks() -> None:
    model = random_model(tiny_config("llama", layers=2))
    family = get_family(model.config)
    shape = shape_of(model.config, family)
    reader = StateDict(dict(model.named_parameters()))
    deep = replace(shape, layers=3)
    trans = Trans(reader, family, deep, deep, LayerMap((0, 1, 2), (False,) * 3))
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.2\.self_attn"):
        trans.check(weights_of(random_model(tiny_config("llama", layers=3))))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("direction", ["wider", "narrower", "stride", "clone"])
@pytest.mark.parametrize("filled", [False, True])
def test_some_rows_are_those_of_the_whole(family: str, direction: str, filled: bool) -> None:
    """Where `splits_by_rows` says so, and for whatever it does not say so nothing is promised."""
    model = random_model(tiny_config(family, heads=6))
    layout = get_family(model.config)
    source = shape_of(model.config, layout)
    kv_heads = 4 // source.group if direction in ("narrower", "stride") else 12 // source.group
    target = replace(
        source, heads=kv_heads * source.group, kv_heads=kv_heads, hidden=kv_heads * source.group * 8, ffn=source.ffn
    )
    target = replace(target, ffn=90 if target.hidden < source.hidden else 300)
    trans = Trans(
        StateDict({name: value.detach() for name, value in model.named_parameters()}),
        layout,
        source,
        target,
        LayerMap((0, 1, 1, 2), (False, False, True, False)),
        selection=Stride() if direction == "stride" else First(),
        growth="clone" if direction == "clone" else "pad",
    )
    split = 0
    names = [name for name, _ in random_model(tiny_config(family, layers=4, heads=6)).named_parameters()]
    for name in names:
        if not trans.splits_by_rows(name):
            continue
        shape = trans.target_shape(name)
        fill = torch.randn(shape) if filled else None
        whole = trans.tensor(name, fill=fill)
        assert tuple(whole.shape) == shape
        for start, stop in ((0, 1), (0, shape[0]), (shape[0] // 3, shape[0] // 2 + 1), (shape[0] - 2, shape[0])):
            part = trans.tensor(name, fill=None if fill is None else fill[start:stop], rows=(start, stop))
            assert torch.equal(part, whole[start:stop]), (name, start, stop)
        split += 1
    assert split > len(names) // 3


def test_the_arithmetic_is_float32_unless_asked() -> None:
    model = random_model(tiny_config("llama")).to(torch.bfloat16)
    layout = get_family(model.config)
    shape = shape_of(model.config, layout)
    trans = Trans(
        StateDict({name: value.detach() for name, value in model.named_parameters()}),
        layout,
        shape,
        replace(shape, hidden=40),
        LayerMap((0, 1, 2), (False,) * 3),
    )
    assert trans.tensor("model.norm.weight").dtype == torch.float32
    assert trans.tensor("model.norm.weight", dtype=torch.float64).dtype == torch.float64


def test_a_target_that_is_not_of_the_family() -> None:
    """The shape of a parameter must be what Trans makes, or fixed sizes would be written where they do not fit."""
    model = random_model(tiny_config("llama"))
    layout = get_family(model.config)
    shape = shape_of(model.config, layout)
    trans = Trans(StateDict(weights_of(model)), layout, shape, shape, LayerMap((0, 1, 2), (False,) * 3))
    trans.check(weights_of(meta_model(model.config)))
    with pytest.raises(ValueError, match=r"embed_tokens.weight of the target has shape \(80, 32\), but .* \(64, 32\)"):
        trans.check(weights_of(meta_model(tiny_config("llama", vocab_size=80))))
