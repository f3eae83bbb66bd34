"""Planned sizes: numbers worked out by hand, and the counts against what torch and transformers do."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
)
from transformers.cache_utils import StaticCache

from cbd_hf import CBDModel, DistillationChain, planning
from cbd_hf.families import get_family
from cbd_hf.layout import count_parameters, shape_of
from cbd_hf.planning import (
    TRAINING_BYTES,
    Counts,
    PlanAnchor,
    PlannedModel,
    Workload,
    cache_bytes,
    count_model,
    forward_flops,
    plan_anchors,
    plan_every_size,
    plan_sizes,
)
from cbd_hf.sizing import plan_config

from .models import FAMILY_NAMES, qwen3_config, random_model, tiny_config


def gpt2(layers: int, hidden: int) -> GPT2Config:
    return GPT2Config(n_layer=layers, n_embd=hidden, n_head=hidden // 64)


def mixtral(**options: Any) -> MixtralConfig:
    return MixtralConfig(
        **{
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
        }
        | options
    )


@pytest.fixture(scope="module")
def gpt2_anchors() -> list[PlanAnchor]:
    """The paper's chain; the counts below are of these."""
    return plan_anchors({"large": gpt2(36, 1280), "base": gpt2(12, 768), "medium": gpt2(24, 1024)})


def test_gpt2_by_hand(gpt2_anchors: list[PlanAnchor]) -> None:
    (row,) = plan_sizes(gpt2_anchors, [138e6], Workload("float32", 1024, 2))
    # Per layer c_attn 768 x 2304, c_proj 768 x 768, and the FFN's two 768 x 3072; then the tied head 50,257 x 768.
    matmul = 14 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072) + 50257 * 768
    assert matmul == 137_687_808
    # 12 heads of 64; a token attends to 512.5 tokens on average.
    forward = 2 * matmul + 4 * 14 * 768 * 1025 // 2
    assert forward == 297_417_216
    # Keys and values of 2 x 1,024 tokens in 14 layers of 768 channels, 4 bytes each.
    cache = 2 * 2 * 1024 * 14 * 768 * 4
    assert row == PlannedModel(
        n_params=138_615_552,
        wanted=138e6,
        difference_percent=pytest.approx(0.446052, abs=1e-6),
        layers=14,
        hidden=768,
        heads=12,
        kv_heads=12,
        head_dim=64,
        ffn=3072,
        forward_flops=forward,
        training_flops=3 * forward,
        weight_bytes=4 * 138_615_552,
        cache_bytes=cache,
        serving_bytes=4 * 138_615_552 + cache,
        training_bytes=16 * 138_615_552,
        alpha=pytest.approx((354_823_168 - 138_615_552) / (354_823_168 - 124_439_808)),
        small="base",
        large="medium",
    )


def test_table_8(gpt2_anchors: list[PlanAnchor]) -> None:
    rows = plan_sizes(gpt2_anchors, [138e6, 220e6, 277e6, 380e6, 537e6])
    assert [(row.n_params, row.layers, row.hidden) for row in rows] == [
        (138_615_552, 14, 768),
        (219_567_488, 18, 896),
        (277_440_128, 24, 896),
        (380_015_616, 26, 1024),
        (537_284_736, 30, 1152),
    ]
    assert [(row.small, row.large) for row in rows] == [("base", "medium")] * 3 + [("medium", "large")] * 2


def test_grouped_heads_by_hand() -> None:
    """Qwen3 0.6B and 1.7B: heads x head_dim is not the width, 8 of 16 heads have keys and values of their own."""
    anchors = plan_anchors({"0.6B": qwen3_config(28, 1024, 3072), "1.7B": qwen3_config(28, 2048, 6144)})
    assert [anchor.n_params for anchor in anchors] == [596_049_920, 1_720_574_976]
    workload = Workload("bfloat16", 2048, 4)
    small, middle, large = plan_sizes(anchors, [596_049_920, 1e9, 1_720_574_976], workload)
    # q and o 1024 x 2048, k and v 1024 x 1024, three FFN matrices 1024 x 3072; the tied head.
    matmul = 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072) + 151936 * 1024
    # Only the norms are no matrices: two of 1,024 and two of 128 per layer, one at the end.
    assert matmul == 596_049_920 - 28 * (2 * 1024 + 2 * 128) - 1024
    assert small.forward_flops == 2 * matmul + 4 * 28 * 16 * 128 * 2049 // 2
    assert small.cache_bytes == middle.cache_bytes == large.cache_bytes == 2 * 28 * 8 * 128 * 2 * 4 * 2048
    assert small.weight_bytes == 2 * 596_049_920 and small.training_bytes == 18 * 596_049_920
    assert small.is_anchor and large.is_anchor and not middle.is_anchor
    assert (small.alpha, large.alpha, small.small, large.large) == (None, None, "0.6B", "1.7B")
    assert (middle.heads, middle.kv_heads, middle.head_dim, middle.ffn) == (16, 8, 128, 3 * middle.hidden)
    assert middle.alpha == pytest.approx((1_720_574_976 - middle.n_params) / (1_720_574_976 - 596_049_920))


def test_experts_by_hand() -> None:
    config = mixtral()
    # q and o 32 x 32, k and v 32 x 16, the router 8 x 32, three matrices 32 x 48 in each of two experts; the head.
    matmul = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 8 * 32 + 2 * 3 * 32 * 48) + 100 * 32
    counts = count_model(config)
    assert counts == Counts(count_parameters(config), matmul)
    # The embedding, six more experts, and five norms.
    assert counts.n_params == matmul + 100 * 32 + 2 * 6 * 3 * 32 * 48 + 5 * 32
    assert forward_flops(config, 10) == 2 * matmul + 4 * 2 * 4 * 8 * 11 // 2
    everyone = count_model(mixtral(num_experts_per_tok=8))
    assert everyone.matmul == matmul + 2 * 6 * 3 * 32 * 48
    for active in (0, 9):
        with pytest.raises(ValueError, match="8 experts, but its num_experts_per_tok is .* 1 to 8"):
            count_model(mixtral(num_experts_per_tok=active))


MIXED = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 6}


def qwen3_mixed() -> PretrainedConfig:
    return tiny_config("qwen3", use_sliding_window=True, max_window_layers=1, **MIXED)


def test_sliding_window_by_hand() -> None:
    full, window = (tiny_config("mistral", sliding_window=size) for size in (None, 6))
    matmul = count_model(full).matmul
    assert count_model(window).matmul == matmul
    # 4 heads of 8 over 3 layers. Ten tokens attend to 1 + 2 + ... + 10 = 55, with the window 1 + ... + 6 + 4 x 6 = 45.
    assert forward_flops(full, 10) == 2 * matmul + round(4 * 3 * 4 * 8 * 5.5)
    assert forward_flops(window, 10) == 2 * matmul + round(4 * 3 * 4 * 8 * 4.5)
    assert forward_flops(window, 6) == forward_flops(full, 6)
    mixed = qwen3_mixed()
    assert forward_flops(mixed, 10) == 2 * count_model(mixed).matmul + round(4 * 4 * 8 * (5.5 + 4.5 + 4.5))
    # 2 key/value heads of 8 in float16, 3 sequences.
    assert cache_bytes(full, Workload("float16", 10, 3)) == 2 * 2 * 8 * 2 * 3 * (10 + 10 + 10)
    assert cache_bytes(window, Workload("float16", 10, 3)) == 2 * 2 * 8 * 2 * 3 * (6 + 6 + 6)
    assert cache_bytes(mixed, Workload("float16", 10, 3)) == 2 * 2 * 8 * 2 * 3 * (10 + 6 + 6)


EXPERTS = {
    "mixtral": mixtral,
    "qwen2_moe": lambda: Qwen2MoeConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        intermediate_size=64,
    ),
}


@pytest.mark.parametrize("name", [*FAMILY_NAMES, *EXPERTS])
def test_matmuls_are_those_that_torch_counts(name: str) -> None:
    """A real forward pass under torch's own counter, which sees the whole square of the attention."""
    config = EXPERTS[name]() if name in EXPERTS else tiny_config(name)
    options = {"experts_implementation": "eager"} if name in EXPERTS else {}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **options).eval()
    rows, length = 2, 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(config.vocab_size, (rows, length)))
    # Rotary angles are a product of two vectors.
    rotary = counter.get_total_flops() - _without_rotary(counter)
    heads, _, head_dim = planning._heads(config, None)
    square = 4 * config.num_hidden_layers * heads * head_dim * length
    assert counter.get_total_flops() - rotary == rows * length * (2 * count_model(config).matmul + square)


def _without_rotary(counter: FlopCounterMode) -> int:
    counts = counter.get_flop_counts()
    rotary = sum(sum(values.values()) for name, values in counts.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


@pytest.mark.parametrize("length", [4, 6, 20])
def test_cache_is_the_one_that_transformers_allocates(length: int) -> None:
    configs = [
        *(tiny_config(name) for name in FAMILY_NAMES),
        tiny_config("mistral", sliding_window=6),
        qwen3_mixed(),
        mixtral(),
    ]
    for config in configs:
        cache = StaticCache(config, max_cache_len=length)
        _, kv_heads, head_dim = planning._heads(config, None)
        cache.early_initialization(3, kv_heads, head_dim, torch.bfloat16, torch.device("meta"))
        allocated = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        assert cache_bytes(config, Workload("bfloat16", length, 3)) == allocated, config.model_type


def test_other_layers_are_refused() -> None:
    config = tiny_config("llama")
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    for cost in (lambda: forward_flops(config, 8), lambda: cache_bytes(config, Workload())):
        with pytest.raises(ValueError, match="linear_attention; .* full_attention and sliding_attention only"):
            cost()


def test_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="mamba has convolutions"):
        count_model(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))


def test_training_bytes() -> None:
    # Weights, gradients and two moments; the copy that autocast makes.
    assert TRAINING_BYTES == {"float32": 4 + 4 + 8, "bfloat16": 4 + 2 + 4 + 8, "float16": 4 + 2 + 4 + 8}


def test_every_size_of_gpt2(gpt2_anchors: list[PlanAnchor], monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(planning, "count_model", lambda config: built.append(config) or count_model(config))
    rows = plan_every_size(gpt2_anchors)
    # Two shallow models for each of the widths 768, 832, ..., 1024 and 1024, 1088, ..., 1280; no model in full.
    assert len(built) == 2 * (5 + 5) and max(config.n_layer for config in built) == 2
    sizes = [row.n_params for row in rows]
    assert sizes == sorted(set(sizes)) and len(sizes) > 100
    assert [row.n_params for row in rows if row.is_anchor] == [124_439_808, 354_823_168, 774_030_080]
    assert {138_615_552, 219_567_488, 277_440_128, 380_015_616, 537_284_736} < set(sizes)
    # The same as asking for the size, which counts the whole model.
    some = rows[::17]
    asked = plan_sizes(gpt2_anchors, [row.n_params for row in some])
    assert [replace(row, wanted=None, difference_percent=None) for row in asked] == some


def test_every_size_of_experts() -> None:
    small, large = (
        mixtral(hidden_size=8 * size, num_hidden_layers=size, num_attention_heads=size, num_key_value_heads=size // 2)
        for size in (4, 8)
    )
    try:
        get_family(small)
    except ValueError as error:
        pytest.skip(f"no chains of mixtral: {error}")
    rows = plan_every_size(plan_anchors({"small": small, "large": large}), Workload(sequence_length=64))
    assert len(rows) > 5
    for row in rows:
        config = plan_config(small, large, row.n_params)
        assert row.n_params == count_parameters(config) and row.forward_flops == forward_flops(config, 64)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_size_is_what_its_config_counts(family: str) -> None:
    configs = {str(heads): tiny_config(family, layers=heads, heads=heads) for heads in (2, 3, 4)}
    anchors = plan_anchors(configs)
    rows = plan_every_size(anchors, Workload(sequence_length=64))
    assert [row.n_params for row in rows if row.is_anchor] == [anchor.n_params for anchor in anchors]
    for row in rows:
        if row.is_anchor:
            config = configs[row.small]
        else:
            config = plan_config(configs[row.small], configs[row.large], row.n_params)
        shape = shape_of(config, get_family(config))
        assert (row.layers, row.hidden, row.heads, row.kv_heads, row.head_dim, row.ffn) == (
            shape.layers,
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.ffn,
        )
        assert row.n_params == count_parameters(config)
        assert row.forward_flops == forward_flops(config, 64)


def test_layers_that_differ_are_counted_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture whose deeper layers are larger: two shallow models do not tell what a deep one is."""

    def counted(config: PretrainedConfig) -> Counts:
        counts = count_model(config)
        return replace(counts, matmul=counts.matmul + config.n_layer**2)

    monkeypatch.setattr(planning, "count_model", counted)
    configs = {str(heads): tiny_config("gpt2", layers=heads, heads=heads) for heads in (2, 4)}
    for row in plan_every_size(plan_anchors(configs), Workload(sequence_length=64)):
        config = plan_config(configs["2"], configs["4"], row.n_params)
        assert row.forward_flops == forward_flops(config, 64)
        assert row.forward_flops == forward_flops(config, 64, matmul=count_model(config).matmul) + 2 * row.layers**2


def test_kinds_of_layers_that_a_shape_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config then comes from `plan_config`, and is counted as it is."""
    anchors = plan_anchors({str(heads): tiny_config("llama", layers=heads, heads=heads) for heads in (2, 4)})
    rows = plan_every_size(anchors)

    def refuse(*args: Any) -> None:
        raise ValueError("mixes kinds of layers")

    monkeypatch.setattr(planning, "config_with_shape", refuse)
    assert plan_every_size(anchors) == rows


def test_impossible_pairs_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise ValueError("mixes layer types")

    anchors = plan_anchors({str(heads): tiny_config("llama", layers=heads, heads=heads) for heads in (2, 4)})
    monkeypatch.setattr(planning, "plan_config", refuse)
    with pytest.raises(ValueError, match="mixes layer types"):
        plan_every_size(anchors)


def test_thinning() -> None:
    anchors = plan_anchors({str(heads): tiny_config("llama", layers=heads, heads=heads) for heads in (2, 4, 8)})
    workload = Workload(sequence_length=64)
    rows = plan_every_size(anchors, workload)
    fifth = plan_every_size(anchors, workload, every=5)
    assert fifth == [row for index, row in enumerate(rows) if index % 5 == 0 or row.is_anchor]
    few = plan_every_size(anchors, workload, limit=9)
    assert len(few) == 9 and sum(row.is_anchor for row in few) == 3
    assert [row for row in rows if row in few] == few
    steps = [math.log(large.n_params / small.n_params) for small, large in zip(few, few[1:], strict=False)]
    # Six between the ends divide the range by seven.
    assert max(steps) < 1.5 * math.log(rows[-1].n_params / rows[0].n_params) / 7
    assert sum(row.is_anchor for row in plan_every_size(anchors, workload, limit=3)) == 3
    third = plan_every_size(anchors, workload, every=3)
    both = plan_every_size(anchors, workload, every=3, limit=6)
    assert len(both) == 6 < len(third) and all(row in third for row in both)
    assert plan_every_size(anchors, workload, limit=10_000) == rows
    with pytest.raises(ValueError, match="limit=2 must be at least 3"):
        plan_every_size(anchors, workload, limit=2)
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        plan_every_size(anchors, workload, every=0)


def test_json_round_trip(gpt2_anchors: list[PlanAnchor]) -> None:
    rows = [*plan_sizes(gpt2_anchors, [138e6]), *plan_every_size(gpt2_anchors, limit=5)]
    assert [PlannedModel(**json.loads(json.dumps(asdict(row)))) for row in rows] == rows


def test_one_anchor() -> None:
    anchors = plan_anchors({"only": tiny_config("llama")})
    (row,) = plan_every_size(anchors)
    assert row.is_anchor and plan_sizes(anchors, [row.n_params])[0].layers == 3
    with pytest.raises(ValueError, match="outside the chain's range"):
        plan_sizes(anchors, [row.n_params + 1])


def test_refused_workloads() -> None:
    with pytest.raises(ValueError, match="dtype='int8' is unknown; choose one of float32, bfloat16, float16"):
        Workload("int8")
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"sequence_length={value} must be a whole number of at least 1"):
            Workload(sequence_length=value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"batch_size={value} must be"):
            Workload(batch_size=value)  # type: ignore[arg-type]


def test_learned_positions_end_a_sequence(gpt2_anchors: list[PlanAnchor]) -> None:
    for plan in (
        lambda work: plan_sizes(gpt2_anchors, [138e6], work),
        lambda work: plan_every_size(gpt2_anchors, work),
    ):
        with pytest.raises(ValueError, match="sequence_length=1,025 .* 1,024 learned positions .* choose 1 to 1,024"):
            plan(Workload(sequence_length=1025))
    llama = plan_anchors({"rotary": tiny_config("llama")})
    assert plan_every_size(llama, Workload(sequence_length=10_000))


def test_refused_anchors(gpt2_anchors: list[PlanAnchor]) -> None:
    with pytest.raises(ValueError, match="at least one anchor"):
        plan_anchors({})
    with pytest.raises(ValueError, match="one and two both have"):
        plan_anchors({"one": tiny_config("llama"), "two": tiny_config("llama")})
    with pytest.raises(ValueError, match="vocab_size"):
        plan_anchors({"one": tiny_config("llama"), "two": tiny_config("llama", heads=2, vocab_size=65)})
    with pytest.raises(ValueError, match="one architecture"):
        plan_anchors({"one": tiny_config("gpt2"), "two": LlamaConfig()})
    # All sizes are checked first: the first one alone would have been fine.
    with pytest.raises(ValueError, match=r"9,000,000,000 is outside .* 124,439,808 .* 774,030,080"):
        plan_sizes(gpt2_anchors, [138e6, 9e9])
    with pytest.raises(ValueError, match="finite"):
        plan_sizes(gpt2_anchors, [float("nan")])


def test_a_cut_decides_which_kinds_of_layers_meet(tmp_path: Path) -> None:
    """The plan of a chain with a cut record and mixed layers is what from_chain makes."""
    kinds = ["full_attention", "sliding_attention"] * 3
    options = {"use_sliding_window": True, "sliding_window": 4}
    layers = [0, 1, 4]
    configs = {
        "large": tiny_config("qwen3", layers=6, layer_types=kinds, **options),
        "small": tiny_config("qwen3", layers=3, layer_types=[kinds[layer] for layer in layers], **options),
    }
    for name, config in configs.items():
        random_model(config).save_pretrained(tmp_path / name)
    cut = {"from": "large", "layers": layers, "removed": [5, 3, 2]}
    chain = DistillationChain.from_anchors(
        [str(tmp_path / "large"), str(tmp_path / "small")], tmp_path / "chain", cuts=[None, cut]
    )
    anchors = plan_anchors(configs, {"small": cut})
    planned_sizes = plan_every_size(anchors, Workload(sequence_length=16))[1:-1]
    assert planned_sizes
    for planned in planned_sizes:
        model = CBDModel.from_chain(chain, planned.n_params)
        assert model.num_parameters() == planned.n_params
        assert cache_bytes(model.config, Workload(sequence_length=16)) == planned.cache_bytes
