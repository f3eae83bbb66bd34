"""Published initialisers against their rules, written out here by plain indexing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbd_hf.checkpoint import CheckpointReader
from cbd_hf.families import get_family
from cbd_hf.initializers import INITIALIZERS, RANDOM, Blueprint
from cbd_hf.initializers.learngene import OwnWeights
from cbd_hf.layout import Family, Norm, meta_model, shape_of, weights_of
from cbd_hf.sizing import corresponding_layers
from cbd_hf.transforms import StateDict, Trans

from ..models import logits, random_model
from .setup import FAMILIES, HEAD_DIM, RIVALS, SMALL, Setup, config_of, tensors_of


Kept = Mapping[str, Sequence[int]]
"""Indices into the larger anchor: `"channels"`, entries of `"query"` and `"key_value"`, FFN `"units"`."""


def subset(tensor: torch.Tensor, name: str, kept: Kept, head_dim: int = HEAD_DIM) -> torch.Tensor:
    """What the indices leave of a tensor of GPT-2, Llama or GPT-NeoX, its axes written out by hand."""
    c, q, kv, u = (list(kept[key]) for key in ("channels", "query", "key_value", "units"))

    def has(*parts: str) -> bool:
        return any(part in name for part in parts)

    if has("wte", "wpe", "embed", "lm_head"):
        return tensor[:, c]
    if has("c_attn"):  # q|k|v on the last axis
        third = tensor.shape[-1] // 3
        columns = [index + part * third for part in range(3) for index in q]
        return tensor[columns] if tensor.dim() == 1 else tensor[c][:, columns]
    if has("attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight"):  # [in, out]
        rows, columns = (c, u) if has("c_fc") else (u if has("mlp") else q, c)
        return tensor[rows][:, columns]
    if has("query_key_value"):  # heads x (q, k, v) x head_dim
        parts = tensor.view(-1, 3, head_dim, *tensor.shape[1:]).transpose(0, 1).flatten(1, 2)
        parts = torch.stack([part[q] for part in parts]).unflatten(1, (-1, head_dim)).transpose(0, 1).flatten(0, 2)
        return parts if tensor.dim() == 1 else parts[:, c]
    if has("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "h_to_4h"):
        rows = u if has("mlp") else q if has("q_proj") else kv
        return tensor[rows] if tensor.dim() == 1 else tensor[rows][:, c]
    if tensor.dim() == 2:  # what writes the stream
        return tensor[c][:, u if has("mlp") else q]
    return tensor[u] if has("c_fc") else tensor[c]


def is_gain(name: str) -> bool:
    return name.endswith("weight") and ("norm" in name or "ln_" in name)


def is_output(name: str) -> bool:
    return any(part in name for part in ("c_proj.weight", "o_proj.weight", "down_proj.weight", "dense.weight")) or (
        "4h_to_h.weight" in name
    )


def from_layer(name: str, family: Family, source: int) -> str:
    return family.join(source, family.split(name)[1])


def heads_of(blocks: Sequence[int], size: int = HEAD_DIM) -> list[int]:
    return [block * size + i for block in blocks for i in range(size)]


def published(have: int, want: int) -> list[int]:
    """OscarXZQ/weight-selection, `uniform_element_selection`."""
    if have % want == 0:
        return (torch.arange(want) * (have // want)).tolist()
    return torch.round(torch.linspace(0, have - 1, want)).long().tolist()


def check_subset(
    setup: Setup,
    made: Mapping[str, torch.Tensor],
    sources: Sequence[int | None],
    kept: Callable[[int | None], Kept],
    gain: float,
    out: Callable[[str], float] = lambda name: 1.0,
    skip: Collection[str] = (),
) -> None:
    """That all that is not random is the larger anchor's by these indices."""
    large = tensors_of(setup.anchors[1])
    for name, value in made.items():
        layer = setup.family.split(name)[0]
        source = None if layer is None else sources[layer]
        if name in skip or layer is not None and source is None:
            continue
        expected = subset(large[name if layer is None else from_layer(name, setup.family, source)], name, kept(source))
        if is_gain(name):
            expected = expected * gain
        elif is_output(name):
            expected = expected * out(name)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0, msg=name)


def first(setup: Setup) -> Kept:
    target = setup.shapes[2]
    return {
        "channels": range(target.hidden),
        "query": range(target.heads * HEAD_DIM),
        "key_value": range(target.kv_heads * HEAD_DIM),
        "units": range(target.ffn),
    }


def fits(name: str, kind: str, seed: int = 0) -> Setup:
    """A setup in which an initialiser is allowed."""
    if name == "hypercloning":
        return Setup(kind, target=(SMALL[0], 2 * SMALL[1]), seed=seed)
    return Setup(kind, seed=seed)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in RIVALS for kind in FAMILIES]
    + [(name, "qwen3_moe") for name in RIVALS if name != "hypercloning"],
)
def test_values_do_not_depend_on_blocks_of_rows(name: str, kind: str) -> None:
    setup = fits(name, kind)
    source = setup.source(name)
    for key, whole in setup.tensors(name).items():
        assert bool(whole.isfinite().all()), key
        half = whole.shape[0] // 2
        for first, last in ((0, 1), (1, half), (half, whole.shape[0])) if source.splits(key) else ():
            assert torch.equal(source.make(key, (first, last)), whole[first:last]), key


@pytest.mark.parametrize("name", RIVALS)
def test_seeds(name: str) -> None:
    """The same seed gives the same bits, in whatever order; another seed another model where something is random."""
    once, again, other = (fits(name, "gpt2", seed) for seed in (0, 0, 1))
    made, source = once.tensors(name), again.source(name)
    for key in reversed(made):
        assert torch.equal(source.make(key, None), made[key]), key
    changed = {key for key, value in other.tensors(name).items() if not torch.equal(value, made[key])}
    assert bool(changed) == (name in ("auto_learngene", "vanilla_learngene", "stack", "interleave"))


def test_every_initializer_is_in_the_docs() -> None:
    table = (Path(__file__).parents[2] / "docs" / "initializers.md").read_text(encoding="utf-8")
    assert all(f"\n| `{name}` |" in table for name in (*INITIALIZERS, RANDOM))


@pytest.mark.parametrize("name", RIVALS)
def test_models_compute(name: str) -> None:
    assert bool(logits(fits(name, "llama").model(name)).isfinite().all())


def clone_error(setup: Setup) -> float:
    """Largest difference of the clone's logits, in their deviations; its weights are float32."""
    expected = logits(deepcopy(setup.anchors[0]))
    return float((logits(setup.model("hypercloning")) - expected).abs().max() / expected.std())


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama-untied", "gpt_neox", "gemma"])
def test_clones_compute_the_same(kind: str, factor: int) -> None:
    setup = Setup(kind, target=(SMALL[0], factor * SMALL[1]))
    assert clone_error(setup) < 1e-4
    field = setup.family.eps_fields[0]
    assert getattr(setup.config, field) == getattr(setup.anchors[0].config, field)


@pytest.mark.parametrize("group", [2, 3])
def test_heads_and_units_are_cloned_by_any_factor(group: int) -> None:
    setup = Setup("llama")
    setup.config = config_of("llama", SMALL[0], 3 * group, head_dim=HEAD_DIM, num_key_value_heads=3)
    setup.config.hidden_size, setup.config.intermediate_size = 2 * 32, 128 + 24
    assert clone_error(setup) < 1e-4


def test_cloning_tiles_as_published() -> None:
    """arXiv 2409.12903 and apple/ml-hypercloning: tile, and divide what reads by the number of copies."""
    config = config_of("llama-untied", *SMALL, num_key_value_heads=SMALL[1])
    model = random_model(config, seed=3)
    family = get_family(config)
    target = config_of("llama-untied", SMALL[0], 3 * SMALL[1], num_key_value_heads=3 * SMALL[1])
    layers = corresponding_layers(config, config, target, family)[0]
    trans = Trans(StateDict(tensors_of(model)), family, shape_of(config, family), shape_of(target, family), layers)
    source = INITIALIZERS["hypercloning"](Blueprint(target, family, trans, trans, {}, 0))
    for name, old in tensors_of(model).items():
        if "embed_tokens" in name:
            expected = old.repeat(1, 3)
        elif "lm_head" in name:
            expected = old.repeat(1, 3) / 3
        else:
            expected = old.repeat(3) if old.dim() == 1 else old.repeat(3, 3) / 3
        torch.testing.assert_close(source.make(name, None), expected, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize(
    ("target", "resize", "message"),
    [
        ((3, 8), {}, "smaller anchor has 2 layers, the target 3"),
        ((2, 6), {}, "multiple of the smaller anchor's 32, got 48"),
        ((2, 8), {"ffn": 100}, "ffn would go from 128 to 100"),
        ((2, 8), {"heads": 4, "kv_heads": 4}, "query heads per key/value head would go from 2 to 1"),
    ],
)
def test_what_cannot_be_cloned(target: tuple[int, int], resize: dict[str, int], message: str) -> None:
    setup = Setup("llama", target=target)
    blueprint = setup.blueprint()
    small = replace(blueprint.small, target=replace(blueprint.small.target, **resize))
    with pytest.raises(ValueError, match=message):
        INITIALIZERS["hypercloning"](replace(blueprint, small=small))


def test_cloning_experts() -> None:
    """Exact if the router is known to read the stream; refused if it is not."""
    setup = Setup("qwen3_moe", target=(SMALL[0], 2 * SMALL[1]))
    router = "mlp.gate.weight"
    for side in ("in", "none"):
        tensors = dict(setup.family.tensors)
        fixed, hidden = tensors[router].axes
        tensors[router] = replace(tensors[router], axes=(fixed, replace(hidden, side=side)))
        setup.family = replace(setup.family, tensors=tensors)
        if side == "none":
            with pytest.raises(ValueError, match=r"what each tensor reads, and of mlp\.gate\.weight"):
                setup.source("hypercloning")
            continue
        setup.config._experts_implementation = "eager"
        assert clone_error(setup) < 1e-4


@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["auto_learngene", "vanilla_learngene"])
def test_learngene(name: str, kind: str, heads: int) -> None:
    setup = Setup(kind, target=(5, heads))
    made = setup.tensors(name)
    sources = [0, 1, 2, None, None] if name == "auto_learngene" else [None, None, 5, 6, 7]
    check_subset(setup, made, sources, lambda layer: first(setup), math.sqrt(8 / heads))
    std = setup.config.initializer_range
    for key, value in made.items():
        layer = setup.family.split(key)[0]
        if layer is None or sources[layer] is not None:
            continue
        if value.dim() == 1:
            assert bool((value == float(is_gain(key))).all()), key
            continue
        # GPT-2's own rule for what writes the stream.
        wanted = std / math.sqrt(2 * 5) if kind == "gpt2" and is_output(key) else std
        assert float(value.std()) == pytest.approx(wanted, rel=0.1), key
        assert not any(
            torch.equal(value, made[from_layer(key, setup.family, other)]) for other in {*range(5)} - {layer}
        )


def test_learngene_of_three_layers_has_no_random_ones() -> None:
    setup = Setup("llama", target=(3, 8))
    check_subset(setup, setup.tensors("auto_learngene"), [0, 1, 2], lambda layer: first(setup), 1.0)
    check_subset(setup, setup.tensors("vanilla_learngene"), [5, 6, 7], lambda layer: first(setup), 1.0)


@pytest.mark.parametrize("name", ["auto_learngene", "vanilla_learngene"])
@pytest.mark.parametrize(
    ("large", "target", "message"),
    [((8, 8), (2, 6), "the target has 2"), ((2, 8), (2, 6), "the larger anchor has 2")],
)
def test_too_few_layers_for_learngene(
    name: str, large: tuple[int, int], target: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"inherits 3 layers, but {message}"):
        Setup("llama", large=large, target=target).source(name)


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "qwen3_moe"])
def test_own_weights_are_those_of_the_class(kind: str) -> None:
    """The same deviation, mean and constants as `from_config` gives, for each tensor by itself."""
    setup = Setup(kind)
    own = OwnWeights(setup.blueprint())
    torch.manual_seed(0)
    for name, wanted in tensors_of(AutoModelForCausalLM.from_config(setup.config)).items():
        value = own.tensor(name)
        assert float(value.std(correction=0)) == pytest.approx(float(wanted.std(correction=0)), rel=0.15), name
        assert float(value.mean()) == pytest.approx(float(wanted.mean()), abs=0.01), name


def test_a_class_without_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = OwnWeights(Setup("llama").blueprint())
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(ValueError, match=r"no rule for a random model\.layers\.0\.mlp\.up_proj\.weight"):
        own.tensor("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("kind", [*FAMILIES, "llama-untied"])
def test_weight_selection(kind: str, heads: int) -> None:
    """Heads 8 -> 4 is the divisible case, 8 -> 6 the other."""
    setup = Setup(kind, target=(5, heads))
    _, large, target = setup.shapes
    kept = {
        "channels": published(large.hidden, target.hidden),
        "query": published(large.heads * HEAD_DIM, target.heads * HEAD_DIM),
        "key_value": published(large.kv_heads * HEAD_DIM, target.kv_heads * HEAD_DIM),
        "units": published(large.ffn, target.ffn),
    }
    # Of those whose head is not tied.
    head = {"gpt_neox": {"embed_out.weight", "lm_head.weight"}, "llama-untied": {"lm_head.weight"}}.get(kind, set())
    head &= set(weights_of(meta_model(setup.config)))
    assert len(head) == (kind in ("gpt_neox", "llama-untied"))
    made = setup.tensors("weight_selection")
    check_subset(setup, made, range(5), lambda layer: kept, 1.0, skip=head)
    for name in head:
        assert float(made[name].std()) == pytest.approx(setup.config.initializer_range, rel=0.1)
    assert setup.source("weight_selection").eps({0: 1e-5}) == 1e-5


def test_weight_selection_only_removes() -> None:
    with pytest.raises(ValueError, match="hidden would go from 64 to 80"):
        Setup("gpt2", target=(4, 10)).source("weight_selection")


@pytest.mark.parametrize("kind", FAMILIES)
def test_stride(kind: str) -> None:
    setup = Setup(kind, target=(3, 4))
    kept = {
        "channels": range(0, 64, 2),
        "query": heads_of([0, 1, 4, 5] if kind == "llama" else [0, 2, 4, 6]),
        "key_value": heads_of([0, 2]),
        "units": range(0, 256, 2),
    }
    check_subset(setup, setup.tensors("stride"), [0, 4, 7], lambda layer: kept, math.sqrt(2))


@pytest.mark.parametrize("kind", FAMILIES)
def test_weight_subcloning(kind: str) -> None:
    setup = Setup(kind)
    importance, target = setup.importance, setup.shapes[2]

    def best(values: torch.Tensor, count: int) -> list[int]:
        ranked = sorted(range(len(values)), key=lambda index: -float(values[index]))
        return sorted(ranked[:count])

    def kept(layer: int | None) -> Kept:
        heads = best(importance.kv_heads[layer or 0], target.kv_heads)
        return {
            "channels": best(importance.hidden, target.hidden),
            "query": heads_of(heads, HEAD_DIM * target.group),
            "key_value": heads_of(heads),
            "units": best(importance.ffn[layer or 0], target.ffn),
        }

    # Heads, FFN units and channels all go from 8 to 6.
    made = setup.tensors("weight_subcloning")
    check_subset(setup, made, [0, 1, 2, 6, 7], kept, math.sqrt(8 / 6), lambda name: math.sqrt(8 / 6))


def test_subcloning_keeps_the_deviation_of_outputs() -> None:
    setup = Setup("llama", small=(2, 8), large=(3, 32), target=(3, 16))
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = tensors_of(setup.anchors[1])[name], setup.tensors("weight_subcloning")[name]
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(500, w.shape[1], generator=generator) @ w.T for w in (before, after))
    assert float(new.std()) == pytest.approx(float(old.std()), rel=0.02)


def test_what_a_norm_scales_is_not_scaled_twice() -> None:
    """A norm of all FFN units right before they are read; one of the queries is not one of what attention gives."""
    setup = Setup("llama")
    gain = setup.family.spec("model.norm.weight")
    roles = {"sub_norm.weight": "ffn", "q_norm.weight": "query", "k_norm.weight": "key_value"}
    norms = {name: replace(gain, norm=Norm("rms", role)) for name, role in roles.items()}
    plain = setup.tensors("weight_subcloning")
    setup.family = replace(setup.family, tensors={**setup.family.tensors, **norms})
    normed = setup.tensors("weight_subcloning")
    for key, value in plain.items():
        scale = math.sqrt(6 / 8) if "down_proj" in key else 1.0
        torch.testing.assert_close(normed[key], value * scale, msg=key)


@pytest.mark.parametrize("name", ["importance", "weight_subcloning"])
def test_scores_need_text(name: str) -> None:
    with pytest.raises(ValueError, match="give calibration"):
        INITIALIZERS[name](Setup("gpt2").blueprint(calibrated=False))


def test_important_layers_channels_and_units() -> None:
    """Layers by block influence, and in them the best channels and units, cut out by plain indexing."""
    setup = Setup("llama")
    _, wide, narrow = setup.shapes
    large = tensors_of(setup.anchors[1])
    made = setup.tensors("importance")
    layers = [*range(narrow.layers - 1), wide.layers - 1]
    channels = setup.importance.hidden.argsort(descending=True)[: narrow.hidden].sort().values
    for target, source in enumerate(layers):
        units = setup.importance.ffn[source].argsort(descending=True)[: narrow.ffn].sort().values
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(made[name.format(target)], large[name.format(source)][channels][:, units])


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("name", "sources"), [("stack", [0, 1, 0, 1, 0]), ("interleave", [0, 0, 0, 1, 1])])
def test_repeated_layers(name: str, sources: list[int], kind: str) -> None:
    setup = Setup(kind, target=(5, SMALL[1]))
    small = tensors_of(setup.anchors[0])
    for key, value in setup.tensors(name).items():
        layer = setup.family.split(key)[0]
        original = key if layer is None else from_layer(key, setup.family, sources[layer])
        assert torch.equal(value, small[original]), key


@pytest.mark.parametrize("name", ["stack", "interleave"])
def test_at_its_own_depth_the_small_anchor_is_expanded(name: str) -> None:
    setup = Setup("gpt2", target=(SMALL[0], 6))
    made, expanded = setup.tensors(name), setup.tensors("expand")
    assert all(torch.equal(value, expanded[key]) for key, value in made.items())
    with pytest.raises(ValueError, match="smaller anchor's 2 layers, but the target has only 1"):
        INITIALIZERS[name](cut_target(setup.blueprint(), 1))


@pytest.mark.parametrize("name", ["importance", "stride", "weight_selection", "weight_subcloning"])
def test_too_many_layers_for_a_subset(name: str) -> None:
    with pytest.raises(ValueError, match="larger anchor's 8 layers, but the target has 9"):
        INITIALIZERS[name](cut_target(Setup("gpt2").blueprint(), 9))


def cut_target(blueprint: Blueprint, layers: int) -> Blueprint:
    small, large = (
        replace(trans, target=replace(trans.target, layers=layers)) for trans in (blueprint.small, blueprint.large)
    )
    return replace(blueprint, small=small, large=large)


KINDS = {
    "stack": None,
    "hypercloning": None,
    "stride": "layer 7 of the anchor in place of the target's layer 4",
    "interleave": "layer 0 of the anchor in place of the target's layer 1",
    "weight_selection": None,
    "auto_learngene": None,
    "vanilla_learngene": "layer 5 of the anchor in place of the target's layer 2",
    "importance": "layer 7 of the anchor in place of the target's layer 4",
    "weight_subcloning": "layer 6 of the anchor in place of the target's layer 3",
}


@pytest.mark.parametrize("name", RIVALS)
def test_layers_of_another_kind_are_refused(name: str, tmp_path: Path) -> None:
    """Sliding and full attention in turn; weights alone would not tell them apart."""
    setup = fits(name, "gemma2")
    readers = []
    for index, model in enumerate(setup.anchors):
        model.save_pretrained(tmp_path / str(index))
        readers.append(CheckpointReader(tmp_path / str(index), model=meta_model(model.config)))
    blueprint = setup.blueprint(readers)
    if KINDS[name] is None:
        INITIALIZERS[name](blueprint)
        return
    with pytest.raises(
        ValueError, match=f"{KINDS[name]}, but they are of different kinds .sliding_attention, full|full"
    ):
        INITIALIZERS[name](blueprint)
