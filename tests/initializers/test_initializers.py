"""The initialisers' own rules, beside what tests/test_modeling.py checks of whole models."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PretrainedConfig, PreTrainedModel

from cbd_hf.alphas import by_group
from cbd_hf.checkpoint import CheckpointReader
from cbd_hf.families import get_family
from cbd_hf.initializers import INITIALIZERS, Blueprint, Rows, TensorSource, assemble, fill_model, made, row_blocks
from cbd_hf.layout import config_with_shape, meta_model, shape_of, weight_shapes, weights_of
from cbd_hf.sizing import corresponding_layers
from cbd_hf.transforms import StateDict, Trans, align_layers, resized_eps

from ..models import logits, random_model, random_tokens, tiny_config


FAMILIES = ("gpt2", "llama", "qwen3")
FFN_IN = {"gpt2": "transformer.h.{}.mlp.c_fc.weight", "other": "model.layers.{}.mlp.up_proj.weight"}
FFN_OUT = {"gpt2": "transformer.h.{}.mlp.c_proj.weight", "other": "model.layers.{}.mlp.down_proj.weight"}


class Setup:
    """Two anchors and a target between them in depth and width, as an initialiser sees them."""

    def __init__(self, family: str, directory: Path, layers: int = 3, heads: int = 4) -> None:
        self.small = random_model(tiny_config(family, layers=2, heads=4), seed=1)
        self.large = random_model(tiny_config(family, layers=4, heads=8), seed=2)
        self.layout = get_family(self.small.config)
        self.config = self.target_config(tiny_config(family, layers=layers, heads=heads))
        self.readers = []
        for name, model in (("small", self.small), ("large", self.large)):
            model.save_pretrained(directory / name)
            self.readers.append(CheckpointReader(directory / name, model=meta_model(model.config)))

    def target_config(self, config: PretrainedConfig) -> PretrainedConfig:
        config = config_with_shape(config, shape_of(config, self.layout), self.layout)
        source, target = shape_of(self.small.config, self.layout), shape_of(config, self.layout)
        for name in self.layout.eps_fields:
            setattr(config, name, resized_eps(getattr(config, name), source, target))
        return config

    def blueprint(self, alpha: float = 0.3, seed: int = 0) -> Blueprint:
        target = shape_of(self.config, self.layout)
        shapes = [shape_of(model.config, self.layout) for model in (self.small, self.large)]
        maps = align_layers(shapes[0].layers, shapes[1].layers, target.layers)
        small, large = (
            Trans(reader, self.layout, shape, target, layers)
            for reader, shape, layers in zip(self.readers, shapes, maps, strict=True)
        )
        return Blueprint(self.config, self.layout, small, large, by_group(alpha, alpha), seed)

    def model(self, initializer: str, alpha: float = 0.3, seed: int = 0) -> PreTrainedModel:
        return assemble(self.config, torch.float32, INITIALIZERS[initializer](self.blueprint(alpha, seed)))

    def names(self, initializer_name: dict[str, str]) -> Iterator[str]:
        pattern = initializer_name.get(self.config.model_type, initializer_name["other"])
        return (pattern.format(layer) for layer in range(shape_of(self.config, self.layout).layers))

    def units_first(self, value: torch.Tensor) -> torch.Tensor:
        """An incoming FFN weight as [unit, hidden]."""
        return value.T if self.config.model_type == "gpt2" else value


@pytest.mark.parametrize("family", FAMILIES)
def test_expand_is_the_small_anchor_in_spite_of_its_noise(family: str, tmp_path: Path) -> None:
    setup = Setup(family, tmp_path, heads=6)
    first, again, other = (setup.model("expand", seed=seed) for seed in (0, 0, 1))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert any(not torch.equal(parameter, other.get_parameter(name)) for name, parameter in first.named_parameters())
    expected = logits(setup.small)
    for model in (first, other):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_expand_gives_every_new_unit_something_to_learn_from(family: str, tmp_path: Path) -> None:
    """Incoming noise of the usual size, and a gradient at every unit's outgoing weights, in every layer."""
    setup = Setup(family, tmp_path, heads=6)
    model = setup.model("expand")
    model(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
    old = shape_of(setup.small.config, setup.layout).ffn
    for incoming, outgoing in zip(setup.names(FFN_IN), setup.names(FFN_OUT), strict=True):
        new = setup.units_first(model.get_parameter(incoming).detach())[old:]
        assert float(new.std()) == pytest.approx(setup.config.initializer_range, rel=0.2), incoming
        gradient = model.get_parameter(outgoing).grad
        assert gradient is not None
        by_unit = (gradient if family == "gpt2" else gradient.T).norm(dim=1)
        assert bool((by_unit > 0).all()), outgoing


def test_expand_of_the_same_width_has_no_noise(tmp_path: Path) -> None:
    setup = Setup("llama", tmp_path)
    model = setup.model("expand")
    source = dict(setup.small.named_parameters())
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), source["model.embed_tokens.weight"])
    for target_layer, small_layer in enumerate((0, 0, 1)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(model.get_parameter(name.format(target_layer)), source[name.format(small_layer)])
    assert not model.get_parameter("model.layers.1.mlp.down_proj.weight").any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_interpolation_where_the_small_anchor_has_nothing(family: str, alpha: float, tmp_path: Path) -> None:
    """Into a unit that only the larger anchor has: its own weights; out of it: scaled by 1 - alpha once."""
    setup = Setup(family, tmp_path, heads=6)
    blueprint = setup.blueprint(alpha)
    model = setup.model("chain", alpha)
    old = shape_of(setup.small.config, setup.layout).ffn
    for layer, (incoming, outgoing) in enumerate(zip(setup.names(FFN_IN), setup.names(FFN_OUT), strict=True)):
        into, out_of = (model.get_parameter(name).detach() for name in (incoming, outgoing))
        into_large, out_of_large = (blueprint.large.tensor(name) for name in (incoming, outgoing))
        into, into_large = setup.units_first(into), setup.units_first(into_large)
        if family != "gpt2":
            out_of, out_of_large = out_of.T, out_of_large.T
        inserted = blueprint.small.layers.inserted[layer]
        first = 0 if inserted else old
        torch.testing.assert_close(into[first:], into_large[first:], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out_of[first:], (1 - alpha) * out_of_large[first:], rtol=1e-5, atol=1e-6)
        if not inserted and alpha < 1:
            hidden = setup.small.config.hidden_size
            small = setup.units_first(blueprint.small.tensor(incoming))
            shared = (slice(old), slice(hidden))
            expected = alpha * small[shared] + (1 - alpha) * into_large[shared]
            torch.testing.assert_close(into[shared], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(into[:, hidden:], into_large[:, hidden:], rtol=1e-6, atol=1e-6)


def test_cut_reads_the_large_anchor_alone(tmp_path: Path) -> None:
    setup = Setup("llama", tmp_path, heads=6)
    for weights_file in (tmp_path / "small").glob("*.safetensors"):
        weights_file.unlink()
    setup.readers[0].close()
    model = setup.model("cut")
    embedding = setup.large.get_parameter("model.embed_tokens.weight")
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), embedding[:, : setup.config.hidden_size])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assemble_writes_every_parameter(dtype: torch.dtype) -> None:
    config = tiny_config("llama")
    asked: list[str] = []
    shapes = weight_shapes(config)

    def make(name: str, rows: Rows | None) -> torch.Tensor:
        assert rows is None
        asked.append(name)
        return torch.full(shapes[name], float(len(asked)))

    model = assemble(config, dtype, TensorSource(make, lambda name: False, ()))
    assert asked == [name for name, _ in model.named_parameters()]
    for value, parameter in enumerate(model.parameters(), start=1):
        assert parameter.dtype == dtype and bool((parameter == value).all())
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_value_of_another_shape_is_refused() -> None:
    """Nothing is spread over a parameter by accident."""
    source = TensorSource(lambda name, rows: torch.zeros(()), lambda name: False, ())
    with pytest.raises(ValueError, match=r"embed_tokens.weight was made with shape \(\), not \(64, 32\)"):
        assemble(tiny_config("llama"), torch.float32, source)


def test_all_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    setup = Setup("llama", tmp_path)
    model = random_model(tiny_config("llama", layers=3, heads=4, intermediate_size=77), seed=5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="of the target has shape"):
        fill_model(model, INITIALIZERS["chain"](setup.blueprint()))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@given(rows=st.integers(1, 3_000_000), width=st.sampled_from([1, 7, 4096, 5_000_000]), splits=st.booleans())
def test_blocks_of_rows(rows: int, width: int, splits: bool) -> None:
    """They cover every row once, and each is no larger than the first that must be."""
    blocks = list(itertools.islice(row_blocks((rows, width), splits), 100_000))
    if blocks == [None]:
        assert not splits or rows * width <= 1 << 22 or rows < 2
        return
    assert splits and blocks[0][0] == 0
    assert all(one[1] == other[0] for one, other in zip(blocks, blocks[1:], strict=False))
    if len(blocks) < 100_000:
        assert blocks[-1][1] == rows
    assert all(stop - start == 1 or (stop - start) * width <= 1 << 22 for start, stop in blocks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["chain", "cut", "expand"])
def test_rows_at_a_time_make_the_same(family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(family, tmp_path, heads=6)
    whole = setup.model(name)
    # The package exports a function of the module's name.
    monkeypatch.setattr(importlib.import_module("cbd_hf.initializers.assemble"), "_BLOCK", 100)
    source = INITIALIZERS[name](setup.blueprint())
    assert any(source.splits(name) for name, _ in whole.named_parameters())
    pieces = setup.model(name)
    for key, parameter in whole.named_parameters():
        assert torch.equal(parameter, pieces.get_parameter(key)), key
        outline = torch.empty(parameter.shape, dtype=torch.bfloat16, device="meta")
        assert torch.equal(made(key, outline, source), parameter.to(torch.bfloat16)), key


def test_alpha_by_group(tmp_path: Path) -> None:
    setup = Setup("gpt2", tmp_path)
    alphas = {"embeddings": 0.1, "attention": 0.35, "ffn": 0.6, "norms": 0.85}
    blueprint = replace(setup.blueprint(), alpha=alphas)
    model = assemble(setup.config, torch.float32, INITIALIZERS["chain"](blueprint))
    groups = {"wte": "embeddings", "wpe": "embeddings", "attn": "attention", "mlp": "ffn", "ln_": "norms"}
    for name, parameter in model.named_parameters():
        alpha = alphas[next(group for part, group in groups.items() if part in name)]
        large = blueprint.large.tensor(name)
        small = blueprint.small.tensor(name, fill=large)
        torch.testing.assert_close(parameter, alpha * small + (1 - alpha) * large, msg=name)


def test_epsilon_is_blended_like_the_gains(tmp_path: Path) -> None:
    setup = Setup("llama", tmp_path, heads=6)
    values = {0: 1e-5, 1: 1e-6}
    for name, expected in (
        ("expand", 1e-5 * 32 / 48),
        ("cut", 1e-6 * 64 / 48),
        ("chain", 0.3 * 1e-5 * 32 / 48 + 0.7 * 1e-6 * 64 / 48),
    ):
        source = INITIALIZERS[name](setup.blueprint(0.3))
        sides = [index for index, _ in enumerate(source.trans)]
        known = values if len(sides) == 2 else {0: values[0 if name == "expand" else 1]}
        assert source.eps(known) == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama-biased", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [3, 5])
def test_blending_in_place_is_blending(kind: str, dtype: torch.dtype, layers: int) -> None:
    """What is blended in the target's memory, whole or by rows, equals what is made tensor by tensor."""
    configs = [
        tiny_config(kind, layers=3, heads=4),
        tiny_config(kind, layers=6, heads=8),
        tiny_config(kind, layers=layers, heads=6),
    ]
    family = get_family(configs[0])
    shapes = [shape_of(config, family) for config in configs]
    anchors = [random_model(config, seed).to(dtype) for seed, config in enumerate(configs[:2])]
    maps = corresponding_layers(configs[0], configs[1], configs[2], family)
    small, large = (
        Trans(StateDict(weights_of(anchor)), family, shape, shapes[2], layers)
        for anchor, shape, layers in zip(anchors, shapes[:2], maps, strict=True)
    )
    alpha = {"embeddings": 0.9, "attention": 0.3, "ffn": 0.6, "norms": 0.5}
    source = INITIALIZERS["chain"](Blueprint(configs[2], family, small, large, alpha, 0))
    in_place = 0
    with torch.no_grad():
        for name, weight in weights_of(meta_model(configs[2])).items():
            plain = source.make(name, None).to(dtype)
            out = torch.full(weight.shape, torch.nan, dtype=dtype)
            made = source.make(name, None, out)
            in_place += made is out
            torch.testing.assert_close(
                made.to(dtype), plain, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-7
            )
            if source.splits(name):
                middle = weight.shape[0] // 2 + 1
                parts = [
                    source.make(name, rows, torch.full((rows[1] - rows[0], *weight.shape[1:]), torch.nan, dtype=dtype))
                    for rows in ((0, middle), (middle, weight.shape[0]))
                ]
                assert torch.equal(torch.cat(parts).to(dtype), made.to(dtype)), name
    assert in_place > len(family.tensors) // 3
