"""The three invariants of Trans (DESIGN section 3), for every family, on shapes drawn at random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cbd_hf.checkpoint import CheckpointReader
from cbd_hf.layout import Shape, config_with_shape, get_family, shape_of
from cbd_hf.transforms import LayerMap, Trans, align_layers, resized_eps

from ..models import FAMILY_NAMES, logits, random_model, tiny_config


PROPERTY = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def transform(
    model: PreTrainedModel, target: Shape, directory: Path, layers: LayerMap | None = None, expansion: str = "identity"
) -> PreTrainedModel:
    """The model that Trans makes of `model` alone."""
    family = get_family(model.config)
    source = shape_of(model.config, family)
    model.save_pretrained(directory)
    if layers is None:
        deeper = max(source.layers, target.layers)
        shallow = min(source.layers, target.layers)
        small, large = align_layers(shallow, deeper, target.layers)
        layers = small if source.layers == shallow else large
    config = config_with_shape(model.config, target, family)
    setattr(config, family.eps_field, resized_eps(getattr(config, family.eps_field), source, target))
    with CheckpointReader(directory, model.base_model_prefix) as reader:
        trans = Trans(reader, family, source, target, layers, expansion)
        result = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in result.named_parameters():
                parameter.copy_(trans.tensor(name))
    return result


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
    with CheckpointReader(tmp_path) as reader:
        trans = Trans(reader, family, wrong, wrong, LayerMap((0, 1, 2), (False,) * 3))
        with pytest.raises(
            ValueError, match=r"gate_proj.weight .* has shape \(128, 32\), but its config says \(64, 32\)"
        ):
            trans.tensor("model.layers.0.mlp.gate_proj.weight")
