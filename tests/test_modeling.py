"""`CBDModel.from_chain`: what it returns, its weights against Eq. 3 written out, saving, and what it refuses."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)
from trl import SFTConfig, SFTTrainer

from cbd_hf import (
    CBDModel,
    DistillationChain,
    StepwiseDistillationConfig,
    StepwiseDistillationTrainer,
    plan_config,
)
from cbd_hf.layout import count_parameters
from cbd_hf.modeling import CONFIG_KEY

from .models import logits, random_model, tiny_config, tiny_tokenizer


CLASSES = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
BLOCK_OUTPUTS = ("attn.c_proj", "mlp.c_proj", "o_proj", "down_proj")
INITIALIZERS = ("chain", "cut", "expand", "random")

# Anchor -> (layers, heads): "deep" chains differ in depth only, "wide" ones in both.
DEEP = {"small": (2, 4), "large": (5, 4)}
WIDE = {"small": (2, 2), "large": (4, 4)}


def anchor(family: str, layers: int, heads: int, **options: Any) -> PreTrainedModel:
    return random_model(tiny_config(family, layers=layers, heads=heads, **options), seed=layers)


def make_chain(
    directory: Path, family: str, shapes: dict[str, tuple[int, int]], *, tokenizer: bool = True, **options: Any
) -> DistillationChain:
    models = [anchor(family, *shape) for shape in shapes.values()]
    for model, (layers, _) in zip(models, shapes.values(), strict=True):
        model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1, max_new_tokens=10 + layers)
    given = tiny_tokenizer() if tokenizer else None
    return DistillationChain.from_anchors(models, directory, names=list(shapes), tokenizer=given, **options)


ChainOf = Callable[..., DistillationChain]


@pytest.fixture(scope="module")
def chain_of(tmp_path_factory: pytest.TempPathFactory) -> ChainOf:
    """Chains by family and kind, made once; never to be written to."""
    made: dict[tuple[str, str], DistillationChain] = {}

    def get(family: str = "gpt2", kind: str = "wide") -> DistillationChain:
        if (family, kind) not in made:
            directory = tmp_path_factory.mktemp("chains") / "chain"
            made[family, kind] = make_chain(directory, family, WIDE if kind == "wide" else DEEP)
        return made[family, kind]

    return get


@pytest.fixture
def chain(chain_of: ChainOf) -> DistillationChain:
    return chain_of()


def middle(chain: DistillationChain) -> float:
    return sum(chain.sizes) / 2


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_equal_weights(model: PreTrainedModel, expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    actual = weights(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name, **tolerance or {"rtol": 0.0, "atol": 0.0})


def interpolated(
    small: PreTrainedModel,
    large: PreTrainedModel,
    sources: Sequence[tuple[int | None, int]],
    alpha: float,
    replicated: dict[int, int] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Eq. 3 for anchors of one width, written out.

    `sources` gives, for each target layer, the smaller anchor's layer (or `None`) and the larger anchor's;
    `replicated`, for target layers that the smaller one lacks, the layer it repeats there.
    """
    one, other = weights(small), weights(large)
    stem = "transformer.h." if isinstance(small, GPT2LMHeadModel) else "model.layers."
    result = {name: alpha * one[name] + (1 - alpha) * other[name] for name in one if not name.startswith(stem)}
    for layer, (small_layer, large_layer) in enumerate(sources):
        for name in (name.removeprefix(f"{stem}0.") for name in one if name.startswith(f"{stem}0.")):
            theirs = other[f"{stem}{large_layer}.{name}"]
            if small_layer is None and replicated is not None:
                small_layer = replicated[layer]
            if small_layer is not None:
                value = alpha * one[f"{stem}{small_layer}.{name}"] + (1 - alpha) * theirs
            elif any(part in name for part in BLOCK_OUTPUTS):
                value = (1 - alpha) * theirs
            else:
                value = theirs
            result[f"{stem}{layer}.{name}"] = value
    return result


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("kind", ["deep", "wide"])
def test_a_stock_model_of_the_planned_shape(family: str, kind: str, chain_of: ChainOf) -> None:
    chain = chain_of(family, kind)
    size = middle(chain)
    model = CBDModel.from_chain(chain, size)
    assert type(model) is CLASSES[family]
    assert not model.training
    planned = plan_config(chain[1].config, chain[0].config, size)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(planned)
    assert {name: tuple(value.shape) for name, value in weights(model).items()} == {
        name: tuple(value.shape) for name, value in weights(CLASSES[family](planned)).items()
    }
    assert torch.isfinite(logits(model)).all()
    assert model.generation_config.max_new_tokens == 12  # the smaller anchor's


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("alpha", [0, 1, None, 0.3])
@pytest.mark.parametrize("expansion", ["identity", "replicate"])
def test_interpolation_written_out(family: str, alpha: float | None, expansion: str, chain_of: ChainOf) -> None:
    chain = chain_of(family, "deep")
    config = tiny_config(family, layers=3)
    model = CBDModel.from_chain(chain, count_parameters(config), alpha=alpha, expansion=expansion)
    expected = interpolated(
        chain["small"].load_model(),
        chain["large"].load_model(),
        [(0, 0), (None, 1), (1, 4)],
        2 / 3 if alpha is None else alpha,  # (5 - 3) / (5 - 2) layers, the only difference
        {1: 0} if expansion == "replicate" else None,
    )
    assert_equal_weights(model, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("cut", "large_layers"),
    [
        ({"layers": [0, 3], "removed": [1, 4, 2]}, (0, 2, 3)),
        ({"layers": [0, 3], "removed": [2, 1, 4]}, (0, 3, 4)),
        ({"layers": [0, 3]}, (0, 1, 3)),
    ],
)
def test_a_recorded_cut_is_used(cut: dict[str, Any], large_layers: tuple[int, ...], tmp_path: Path) -> None:
    chain = make_chain(tmp_path / "chain", "llama", DEEP, cuts=[{"from": "large"} | cut, None])
    model = CBDModel.from_chain(chain, config=tiny_config("llama", layers=3), alpha=0.3)
    sources = [({0: 0, 3: 1}.get(layer), layer) for layer in large_layers]
    expected = interpolated(chain["small"].load_model(), chain["large"].load_model(), sources, 0.3)
    assert_equal_weights(model, expected, rtol=1e-6, atol=1e-6)


def test_a_cut_from_an_anchor_further_up_is_not_used(tmp_path: Path) -> None:
    shapes = {"large": (5, 4), "medium": (4, 4), "small": (2, 4)}
    chain = make_chain(tmp_path / "chain", "llama", shapes, cuts=[None, None, {"from": "large", "layers": [0, 1]}])
    model = CBDModel.from_chain(chain, config=tiny_config("llama", layers=3), alpha=0.3)
    expected = interpolated(
        chain["small"].load_model(), chain["medium"].load_model(), [(0, 0), (None, 1), (1, 3)], 0.3
    )
    assert_equal_weights(model, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("wanted", [0.2, 0.5, 0.8, "config"])
def test_alpha_one_is_the_small_anchor(family: str, wanted: float | str, chain_of: ChainOf) -> None:
    """Larger, but the same function: exact for LayerNorm and RMSNorm."""
    chain = chain_of(family)
    small = chain["small"].load_model()
    if isinstance(wanted, float):
        model = CBDModel.from_chain(chain, (1 - wanted) * chain.sizes[1] + wanted * chain.sizes[0], alpha=1)
    else:
        config = tiny_config(family, layers=3, heads=3, **({} if family == "gpt2" else {"intermediate_size": 101}))
        model = CBDModel.from_chain(chain, config=config, alpha=1)
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (3, 24)
    assert model.num_parameters() > small.num_parameters()
    expected = logits(small)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", CLASSES)
def test_alpha_zero_is_the_large_anchors_cut(family: str, chain_of: ChainOf) -> None:
    chain = chain_of(family)
    one, other = (
        CBDModel.from_chain(chain, middle(chain), **options) for options in ({"alpha": 0}, {"initializer": "cut"})
    )
    assert_equal_weights(one, weights(other))
    blend = CBDModel.from_chain(chain, middle(chain), alpha=0.5)
    assert not torch.equal(logits(blend), logits(one))


def test_epsilon_follows_the_width(chain_of: ChainOf) -> None:
    chain = chain_of("llama")
    config = tiny_config("llama", layers=3, heads=3)
    eps = config.rms_norm_eps
    for alpha in (0, 0.25, 1):
        model = CBDModel.from_chain(chain, config=config, alpha=alpha)
        assert model.config.rms_norm_eps == pytest.approx(alpha * eps * 2 / 3 + (1 - alpha) * eps * 4 / 3)
        assert model.model.norm.variance_epsilon == model.config.rms_norm_eps


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("wanted", ["n_params", "float", "config"])
def test_exactly_an_anchor(name: str, wanted: str, chain: DistillationChain) -> None:
    size = chain[name].n_params
    options: dict[str, Any] = {
        "n_params": {"n_params": size},
        "float": {"n_params": float(size)},
        "config": {"config": chain[name].config},
    }[wanted]
    model = CBDModel.from_chain(chain, **options)
    assert type(model) is GPT2LMHeadModel and not model.training
    assert_equal_weights(model, weights(chain[name].load_model()))
    if wanted != "config":
        assert model.config.cbd == {"anchor": name}


def test_from_a_directory(chain: DistillationChain) -> None:
    expected = weights(CBDModel.from_chain(chain, middle(chain)))
    for path in (chain.path, str(chain.path)):
        assert_equal_weights(CBDModel.from_chain(path, middle(chain)), expected)


def test_from_the_hub(chain: DistillationChain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(repo_id: str, **kwargs: Any) -> str:
        asked.append((repo_id, kwargs["revision"], kwargs["token"], kwargs["cache_dir"]))
        return str(chain.path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = CBDModel.from_chain("me/chain", middle(chain), revision="v1", token="t", cache_dir=tmp_path)
    assert asked == [("me/chain", "v1", "t", str(tmp_path))]
    assert_equal_weights(model, weights(CBDModel.from_chain(chain, middle(chain))))


def test_sharded_anchors(chain: DistillationChain, tmp_path: Path) -> None:
    for name, shape in WIDE.items():
        anchor("gpt2", *shape).save_pretrained(tmp_path / name, max_shard_size="30KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
    sharded = DistillationChain.from_anchors([tmp_path / name for name in WIDE], tmp_path / "chain")
    assert_equal_weights(
        CBDModel.from_chain(sharded, middle(chain)), weights(CBDModel.from_chain(chain, middle(chain)))
    )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.bfloat16),
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_dtype(dtype: torch.dtype | str | None, expected: torch.dtype, exact: bool, tmp_path: Path) -> None:
    models = [anchor("llama", *shape).to(torch.bfloat16) for shape in DEEP.values()]
    chain = DistillationChain.from_anchors(models, tmp_path / "chain")
    before = torch.get_default_dtype()
    model = CBDModel.from_chain(chain, chain.sizes[0] if exact else middle(chain), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.config.dtype == expected
    assert torch.get_default_dtype() == before


@pytest.mark.parametrize("initializer", INITIALIZERS)
@pytest.mark.parametrize("expansion", ["identity", "replicate"])
def test_every_initializer(initializer: str, expansion: str, chain_of: ChainOf) -> None:
    chain = chain_of("llama")
    model = CBDModel.from_chain(chain, middle(chain), initializer=initializer, expansion=expansion, alpha=0.5)
    assert type(model) is LlamaForCausalLM and not model.training
    assert torch.isfinite(logits(model)).all()
    record = getattr(model.config, CONFIG_KEY)
    assert (record["initializer"], record["expansion"]) == (initializer, expansion)
    if initializer != "random":
        assert record["alpha"] == {"chain": 0.5, "cut": 0.0, "expand": 1.0}[initializer]


def test_initializers_differ(chain: DistillationChain) -> None:
    results = [logits(CBDModel.from_chain(chain, middle(chain), initializer=name)) for name in INITIALIZERS]
    for index, one in enumerate(results):
        assert not any(torch.allclose(one, other, rtol=1e-3) for other in results[:index])


@pytest.mark.parametrize("size", ["anchor", "between"])
def test_random_start(size: str, chain: DistillationChain) -> None:
    n_params = chain.sizes[0] if size == "anchor" else middle(chain)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (CBDModel.from_chain(chain, n_params, initializer="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal_weights(first, weights(again))
    name = "transformer.wte.weight"
    assert not torch.equal(weights(first)[name], weights(other)[name])
    assert float(weights(first)[name].std()) == pytest.approx(first.config.initializer_range, rel=0.2)


def test_what_the_config_records(chain: DistillationChain, tmp_path: Path) -> None:
    model = CBDModel.from_chain(chain, middle(chain))
    small, large = chain["small"].n_params, chain["large"].n_params
    n_params = sum(parameter.numel() for parameter in model.parameters())
    assert model.config.cbd == {
        "initializer": "chain",
        "alpha": pytest.approx((large - n_params) / (large - small)),
        "expansion": "identity",
        "small": {"name": "small", "n_params": small},
        "large": {"name": "large", "n_params": large},
        "n_params": n_params,
    }
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).cbd == model.config.cbd


@pytest.mark.parametrize("family", CLASSES)
def test_save_and_load(family: str, chain_of: ChainOf, tmp_path: Path) -> None:
    chain = chain_of(family)
    model = CBDModel.from_chain(chain, middle(chain))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert_equal_weights(loaded, weights(model))
    assert loaded.generation_config.max_new_tokens == model.generation_config.max_new_tokens
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize("exact", [False, True])
def test_the_tokenizer_is_saved_beside(exact: bool, chain: DistillationChain, tmp_path: Path) -> None:
    model = CBDModel.from_chain(chain, chain.sizes[1] if exact else middle(chain))
    model.save_pretrained(tmp_path / "other-rank", is_main_process=False)
    assert not (tmp_path / "other-rank" / "tokenizer_config.json").exists()
    model.save_pretrained(tmp_path / "new", max_shard_size="20KB")
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    assert (tmp_path / "new" / "model.safetensors.index.json").is_file()


def test_a_tokenizer_that_is_there_stays(chain: DistillationChain, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["mine"])
    tokenizer.save_pretrained(tmp_path)
    names = ("tokenizer.json", "tokenizer_config.json")
    before = [(tmp_path / name).read_bytes() for name in names]
    CBDModel.from_chain(chain, middle(chain)).save_pretrained(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == before
    assert (tmp_path / "model.safetensors").is_file()


def test_a_chain_without_tokenizer(tmp_path: Path) -> None:
    chain = make_chain(tmp_path / "chain", "gpt2", DEEP, tokenizer=False)
    CBDModel.from_chain(chain, middle(chain)).save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").glob("tokenizer*"))


def test_a_deep_copy_saves_its_own_weights(chain: DistillationChain, tmp_path: Path) -> None:
    model = CBDModel.from_chain(chain, middle(chain))
    before = {name: value.clone() for name, value in weights(model).items()}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    for one, name in ((model, "model"), (twin, "twin")):
        one.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "tokenizer_config.json").is_file()
    assert_equal_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), before)
    assert_equal_weights(
        AutoModelForCausalLM.from_pretrained(tmp_path / "twin"), {name: value + 1 for name, value in before.items()}
    )


def test_a_pickled_model_is_whole(chain: DistillationChain, tmp_path: Path) -> None:
    model = CBDModel.from_chain(chain, middle(chain))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_equal_weights(loaded, weights(model))
    loaded.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer_config.json").is_file()


def test_tied_weights_stay_tied(chain: DistillationChain) -> None:
    model = CBDModel.from_chain(chain, middle(chain))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_callers_config_is_not_changed(chain: DistillationChain) -> None:
    config = tiny_config("gpt2", layers=3, heads=3)
    before = copy.deepcopy(vars(config))
    model = CBDModel.from_chain(chain, config=config)
    assert vars(config) == before
    assert model.config is not config
    assert (model.config.n_layer, model.config.n_embd) == (3, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either n_params, such as 138e6, or config"),
        ({"n_params": 3e4, "config": tiny_config("gpt2", layers=3)}, "and not both"),
        ({"n_params": 3e4, "alpha": 1.01}, r"alpha=1.01 is outside \[0, 1\]"),
        ({"n_params": 3e4, "alpha": -0.1}, r"alpha=-0.1 is outside \[0, 1\]"),
        ({"n_params": 3e4, "alpha": float("nan")}, r"alpha=nan is outside \[0, 1\]"),
        ({"n_params": 3e4, "initializer": "magic"}, "'magic' is unknown; choose one of .*chain.*random"),
        ({"n_params": 3e4, "expansion": "magic"}, "'magic' is unknown; choose one of .*identity"),
        ({"n_params": 1e3}, "outside the chain's range"),
        ({"n_params": 1e9}, "outside the chain's range"),
        ({"config": tiny_config("gpt2", layers=9, heads=9)}, "outside the chain's range"),
        ({"config": tiny_config("llama", layers=3, heads=3)}, "one architecture, got 'gpt2' and 'llama'"),
        ({"config": tiny_config("gpt2", layers=3, heads=3, vocab_size=80)}, "agree in vocab_size, got 64 and 80"),
        ({"config": tiny_config("gpt2", layers=2, heads=3, n_positions=90)}, "agree in the number of positions"),
        ({"config": tiny_config("gpt2", layers=1, heads=4)}, "1 layers must lie between the anchors' 2 and 4"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, chain: DistillationChain) -> None:
    with pytest.raises(ValueError, match=message):
        CBDModel.from_chain(chain, **options)


def test_refusals_come_before_the_chain_is_opened() -> None:
    with pytest.raises(ValueError, match="alpha=2"):
        CBDModel.from_chain("./nowhere", 1e6, alpha=2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CBDModel.from_chain("./nowhere", 1e6)


@pytest.mark.parametrize("dtype", ["bf16", "half", "int8", torch.int64])
def test_dtypes_that_weights_cannot_have(dtype: Any, chain: DistillationChain) -> None:
    with pytest.raises(ValueError, match=r"choose one of \['bfloat16', 'float16', 'float32', 'float64'\]"):
        CBDModel.from_chain(chain, middle(chain), dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_names_of_a_dtype(dtype: Any, chain: DistillationChain) -> None:
    assert CBDModel.from_chain(chain, middle(chain), dtype=dtype).dtype == torch.bfloat16


def test_a_size_with_a_unit(chain: DistillationChain, tmp_path: Path) -> None:
    size = middle(chain)
    expected = CBDModel.from_chain(chain, size).config.to_dict()
    assert CBDModel.from_chain(chain, f"{size / 1e3}k").config.to_dict() == expected
    (config,) = CBDModel.save_from_chain(chain, f"{size / 1e3}k", tmp_path / "one")
    assert config.cbd["n_params"] == expected["cbd"]["n_params"]
    with pytest.raises(ValueError, match="n_params='big' is not a number of parameters"):
        CBDModel.from_chain(chain, "big")
    with pytest.raises(ValueError, match="finite number"):
        CBDModel.from_chain(chain, "nan")


@pytest.mark.parametrize("exact", [False, True])
def test_trainers_find_the_tokenizer(exact: bool, chain: DistillationChain, tmp_path: Path) -> None:
    model = CBDModel.from_chain(
        shutil.copytree(chain.path, tmp_path / "moved"), chain.sizes[1] if exact else middle(chain)
    )
    rows = Dataset.from_dict({"text": ["w3 w4 w5", "w6 w7"]})
    options = {"report_to": [], "use_cpu": True, "max_length": 16, "bf16": False}
    sft = SFTTrainer(model, SFTConfig(str(tmp_path / "sft"), **options), train_dataset=rows)
    assert sft.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    stepwise = StepwiseDistillationTrainer(
        model, chain[0].load_model(), StepwiseDistillationConfig(str(tmp_path / "step"), **options), train_dataset=rows
    )
    assert stepwise.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    # Where it was found is nowhere in what is saved.
    model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def test_an_adapter_does_not_name_an_anchor_as_its_base(chain: DistillationChain) -> None:
    model = get_peft_model(CBDModel.from_chain(chain, middle(chain)), LoraConfig(target_modules=["c_attn"]))
    assert not model.peft_config["default"].base_model_name_or_path


def test_numbers_of_numpy(chain: DistillationChain) -> None:
    expected = CBDModel.from_chain(chain, int(middle(chain)), alpha=0.5)
    made = CBDModel.from_chain(chain, np.int64(middle(chain)), alpha=np.float32(0.5))
    assert all(
        torch.equal(one, other) for one, other in zip(weights(made).values(), weights(expected).values(), strict=True)
    )


def test_kinds_of_a_cut_chains_target(tmp_path: Path) -> None:
    """The record of a cut says which layers meet; a config whose kinds are others is refused."""
    kinds = ["full_attention", "full_attention", *["sliding_attention"] * 4]
    options = {"use_sliding_window": True, "sliding_window": 4}
    large = random_model(tiny_config("qwen3", layers=6, layer_types=kinds, **options))
    small = random_model(tiny_config("qwen3", layers=3, layer_types=[kinds[i] for i in (0, 2, 5)], **options))
    for name, model in (("large", large), ("small", small)):
        model.save_pretrained(tmp_path / name)
    cut = {"from": "large", "layers": [0, 2, 5], "removed": [1, 3, 4]}
    chain = DistillationChain.from_anchors(
        [str(tmp_path / "large"), str(tmp_path / "small")], tmp_path / "chain", cuts=[None, cut]
    )
    wrong = tiny_config("qwen3", layers=4, layer_types=["sliding_attention"] * 3 + ["full_attention"], **options)
    with pytest.raises(ValueError, match="layers of different kinds would meet"):
        CBDModel.from_chain(chain, config=wrong, initializer="cut")
    made = CBDModel.from_chain(chain, middle(chain))
    assert made.config.layer_types[0] == "full_attention" and "sliding_attention" in made.config.layer_types[1:]
