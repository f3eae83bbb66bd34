"""From a number of parameters to a config: the paper's Table 8, other families, and the search itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from cbd_hf import CBDModel, DistillationChain, plan_config
from cbd_hf.families import get_family
from cbd_hf.layout import Shape, config_with_shape, count_parameters, shape_of
from cbd_hf.sizing import check_n_params, default_alpha, format_size, lattice, neighbouring_sizes, plan_cut

from .models import qwen3_config, random_model, tiny_config


# The paper's chain: GPT-2 base, medium and large.
GPT2_CHAIN = [
    GPT2Config(n_layer=12, n_embd=768, n_head=12),
    GPT2Config(n_layer=24, n_embd=1024, n_head=16),
    GPT2Config(n_layer=36, n_embd=1280, n_head=20),
]
GPT2_SIZES = [124_439_808, 354_823_168, 774_030_080]


def llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        **{"vocab_size": 49152, "tie_word_embeddings": False} | options,
    )


def llama_count(shape: Shape, tied: bool, head_norms: bool = False) -> int:
    """The parameters of a Llama without biases, written out."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 2 * shape.hidden * (query + key_value) + (2 * shape.head_dim if head_norms else 0)
    layer = attention + 3 * shape.hidden * shape.ffn + 2 * shape.hidden
    return shape.vocab * shape.hidden * (1 if tied else 2) + shape.layers * layer + shape.hidden


def planned(small: PretrainedConfig, large: PretrainedConfig, n_params: float) -> Shape:
    config = plan_config(small, large, n_params)
    assert type(config) is type(small)
    return shape_of(config, get_family(config))


@pytest.mark.parametrize(
    ("pair", "n_params", "layers", "hidden", "exact", "alpha"),
    [
        ((0, 1), 138e6, 14, 768, 138_615_552, 0.94),
        ((0, 1), 220e6, 18, 896, 219_567_488, 0.59),
        ((0, 1), 277e6, 24, 896, 277_440_128, 0.34),
        ((1, 2), 380e6, 26, 1024, 380_015_616, None),
        ((1, 2), 537e6, 30, 1152, 537_284_736, None),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_table_8(
    pair: tuple[int, int], n_params: float, layers: int, hidden: int, exact: int, alpha: float | None, swapped: bool
) -> None:
    small, large = (GPT2_CHAIN[index] for index in pair)
    config = plan_config(large, small, n_params) if swapped else plan_config(small, large, n_params)
    assert isinstance(config, GPT2Config)
    assert (config.n_layer, config.n_embd, config.n_head) == (layers, hidden, hidden // 64)
    assert config.n_inner in (None, 4 * hidden)
    assert count_parameters(config) == exact
    if alpha is not None:
        assert default_alpha(GPT2_SIZES[pair[0]], GPT2_SIZES[pair[1]], exact) == pytest.approx(alpha, abs=0.005)


def test_sizes_of_the_papers_anchors() -> None:
    assert [count_parameters(config) for config in GPT2_CHAIN] == GPT2_SIZES


def test_default_alpha_at_the_ends() -> None:
    assert default_alpha(100, 300, 100) == 1
    assert default_alpha(100, 300, 300) == 0
    assert default_alpha(100, 300, 250) == 0.25


class RealTensors(TorchDispatchMode):
    """Records how many values were made on a real device at once."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self.largest = max(self.largest, value.numel())
        return result


def test_no_weights_are_allocated() -> None:
    # Learning a layout needs a tiny model; it is done once in a process.
    for config in (*GPT2_CHAIN, qwen3_config(28, 1024, 3072), qwen3_config(28, 2048, 6144)):
        get_family(config)
    with RealTensors() as real:
        torch.empty(123)
        assert real.largest == 123  # the recorder works
        plan_config(GPT2_CHAIN[1], GPT2_CHAIN[2], 537e6)
        plan_config(qwen3_config(28, 1024, 3072), qwen3_config(28, 2048, 6144), 1e9)
    assert real.largest < 10_000


GROUPED = [
    # SmolLM2-135M and a 2/3 of it: of the three steps of one head, only those with whole key/value heads remain.
    (llama(12, 384, 6, 2, 1024), llama(30, 576, 9, 3, 1536), {384, 576}),
    (llama(12, 1024, 16, 2, 2816), llama(22, 2048, 32, 4, 5632), {1024, 1536, 2048}),
    (
        llama(8, 256, 4, 2, 1024, vocab_size=1000, tie_word_embeddings=True),
        llama(16, 512, 8, 4, 2048, vocab_size=1000, tie_word_embeddings=True),
        {256, 384, 512},
    ),
]


@pytest.mark.parametrize(("small", "large", "widths"), GROUPED)
def test_grouped_heads(small: LlamaConfig, large: LlamaConfig, widths: set[int]) -> None:
    tied = small.tie_word_embeddings
    family = get_family(small)
    low, high = (llama_count(shape_of(config, family), tied) for config in (small, large))
    assert (count_parameters(small), count_parameters(large)) == (low, high)
    seen = set()
    for share in (0.02, 0.2, 0.35, 0.5, 0.65, 0.8, 0.98):
        config = plan_config(small, large, low + share * (high - low))
        shape = shape_of(config, family)
        assert shape.hidden == shape.heads * shape.head_dim and shape.head_dim == 64
        assert shape.group == small.num_attention_heads // small.num_key_value_heads
        assert shape.hidden / small.hidden_size == shape.kv_heads / small.num_key_value_heads
        assert shape.ffn / shape.hidden == pytest.approx(small.intermediate_size / small.hidden_size, rel=1e-3)
        assert count_parameters(config) == llama_count(shape, tied)
        assert config.tie_word_embeddings == tied
        seen.add(shape.hidden)
    assert seen <= widths and len(seen) > 1


def test_smollm2_shape_has_the_published_size() -> None:
    assert count_parameters(llama(30, 576, 9, 3, 1536, tie_word_embeddings=True)) == 134_515_008


def test_constant_heads_with_explicit_head_dim() -> None:
    """Qwen3 0.6B and 1.7B differ in width and FFN only: heads x head_dim is not the hidden size."""
    small, large = qwen3_config(28, 1024, 3072), qwen3_config(28, 2048, 6144)
    assert (count_parameters(small), count_parameters(large)) == (596_049_920, 1_720_574_976)
    shape = planned(small, large, 1e9)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (28, 16, 8, 128)
    assert shape.hidden % 128 == 0 and shape.ffn == 3 * shape.hidden
    counts = [
        llama_count(replace(shape, hidden=hidden, ffn=3 * hidden), True, True) for hidden in range(1024, 2049, 128)
    ]
    assert llama_count(shape, True, True) == min(counts, key=lambda count: abs(count - 1e9))
    assert count_parameters(plan_config(small, large, 1e9)) == llama_count(shape, True, True)


def test_untied_gpt2() -> None:
    tied, untied = (
        [
            tiny_config("gpt2", layers=layers, heads=heads, tie_word_embeddings=tie)
            for layers, heads in ((2, 2), (4, 4))
        ]
        for tie in (True, False)
    )
    assert count_parameters(untied[0]) == count_parameters(tied[0]) + untied[0].vocab_size * untied[0].n_embd
    middle = plan_config(*untied, sum(map(count_parameters, untied)) / 2)
    assert middle.tie_word_embeddings is False


def test_only_the_ffn_differs() -> None:
    small, large = (tiny_config("llama", intermediate_size=ffn) for ffn in (64, 128))
    sizes = [count_parameters(small), count_parameters(large)]
    shape = planned(small, large, sum(sizes) / 2)
    assert shape == replace(shape_of(small, get_family(small)), ffn=96)


def test_an_ffn_written_out_beside_an_implied_one() -> None:
    """GPT-2 writes `None` for 4 x hidden; both ways of saying it may be mixed."""
    small, large = tiny_config("gpt2", layers=2, heads=2, n_inner=64), tiny_config("gpt2", layers=4, heads=4)
    n_params = (count_parameters(small) + count_parameters(large)) / 2
    for pair in ((small, large), (large, small)):
        shape = planned(*pair, n_params)
        assert shape.ffn == 4 * shape.hidden


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("pair", [(0, 1), (1, 2)])
def test_exactly_an_anchor(index: int, pair: tuple[int, int]) -> None:
    anchors = [GPT2_CHAIN[pair[0]], GPT2_CHAIN[pair[1]]]
    config = plan_config(*anchors, GPT2_SIZES[pair[index]])
    assert shape_of(config, get_family(config)) == shape_of(anchors[index], get_family(config))


def test_planning_leaves_the_anchors_configs_alone() -> None:
    before = [config.to_dict() for config in GPT2_CHAIN[:2]]
    plan_config(*GPT2_CHAIN[:2], 200e6).n_embd = 1
    assert [config.to_dict() for config in GPT2_CHAIN[:2]] == before


@pytest.mark.parametrize("n_params", [-1, 0, 100e6, 124_439_807, 354_823_169, 1e12])
def test_outside_the_range(n_params: float) -> None:
    with pytest.raises(ValueError, match=r"124,439,808 \(124.4M\) to 354,823,168 \(354.8M\)"):
        plan_config(*GPT2_CHAIN[:2], n_params)


def test_neighbouring_sizes() -> None:
    small, large = GPT2_CHAIN[:2]
    counts = sorted(count for _, count in lattice(*GPT2_CHAIN[:2], get_family(small)))
    index = len(counts) // 2
    below, above = counts[index], next(count for count in counts if count > counts[index])
    assert neighbouring_sizes(small, large, below) == (below, below)
    assert neighbouring_sizes(small, large, below + 1) == (below, above)
    assert neighbouring_sizes(small, large, 1) == (counts[0], counts[0])
    assert neighbouring_sizes(small, large, 1e12) == (counts[-1], counts[-1])


def test_a_size_that_is_far_off_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = [random_model(tiny_config("gpt2", layers=layers)) for layers in (5, 2)]  # sizes one layer apart
    chain = DistillationChain.from_anchors(models, tmp_path / "chain")
    large, small = chain.sizes
    layer = (large - small) // 3
    made = CBDModel.from_chain(chain, small + 1.4 * layer)
    assert count_parameters(made.config) == small + layer
    (record,) = caplog.records
    assert f"n_params={small + 1.4 * layer:,.0f}: " in record.getMessage()
    assert f"has {small + layer:,} parameters" in record.getMessage() and "% fewer" in record.getMessage()
    assert f"are {small + layer:,} (" in record.getMessage() and f"and {small + 2 * layer:,} (" in record.getMessage()
    caplog.clear()
    CBDModel.from_chain(chain, small + 1.01 * layer)
    CBDModel.from_chain(chain, small)
    CBDModel.from_chain(chain, config=made.config)
    assert not caplog.records


@pytest.mark.parametrize("n_params", [float("nan"), float("inf"), True, "138M", None])
def test_not_a_number(n_params: Any) -> None:
    with pytest.raises(ValueError, match="finite number"):
        plan_config(*GPT2_CHAIN[:2], n_params)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (tiny_config("llama"), "one architecture, got 'gpt2' and 'llama'"),
        (tiny_config("gpt2", vocab_size=80), "vocab_size, got 64 and 80"),
        (tiny_config("gpt2", head_dim=16), "head_dim, got 8 and 16"),
        (tiny_config("gpt2", n_positions=32), "positions, got 64 and 32"),
        (tiny_config("gpt2", activation_function="relu"), "activation_function"),
        (tiny_config("gpt2", tie_word_embeddings=False), "tie_word_embeddings"),
    ],
)
def test_anchors_that_do_not_belong_together(other: PretrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_config(tiny_config("gpt2"), other, 50e3)


def all_counts(small: Shape, large: Shape, tied: bool) -> Iterator[int]:
    """Counts of every shape between two that are multiples of one key/value group."""
    for layers in range(small.layers, large.layers + 1):
        for kv_heads in range(small.kv_heads, large.kv_heads + 1):
            heads = kv_heads * small.group
            hidden = heads * small.head_dim
            yield llama_count(
                replace(small, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=4 * hidden), tied
            )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    layers=st.tuples(st.integers(1, 4), st.integers(0, 5)),
    kv_heads=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    group=st.integers(1, 3),
    tied=st.booleans(),
    share=st.floats(0, 1),
)
def test_the_nearest_shape_is_chosen(
    layers: tuple[int, int], kv_heads: tuple[int, int], group: int, tied: bool, share: float
) -> None:
    assume(layers[1] or kv_heads[1])
    small, large = (
        tiny_config(
            "llama", layers=n, heads=k * group, num_key_value_heads=k, vocab_size=512, tie_word_embeddings=tied
        )
        for n, k in ((layers[0], kv_heads[0]), (sum(layers), sum(kv_heads)))
    )
    low, high = count_parameters(small), count_parameters(large)
    n_params = low + share * (high - low)
    nearest = min(
        abs(count - n_params)
        for count in all_counts(*(shape_of(config, get_family(config)) for config in (small, large)), tied)
    )
    assert abs(count_parameters(plan_config(small, large, n_params)) - n_params) == nearest


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_plan_cut(family: str) -> None:
    config = tiny_config(family, layers=6)
    shape = shape_of(config, get_family(config))
    sizes = {
        layers: count_parameters(config_with_shape(config, replace(shape, layers=layers), get_family(config)))
        for layers in range(1, 7)
    }
    for layers in range(1, 6):
        for n_params in (sizes[layers], sizes[layers] + 10, sizes[layers] - 10):
            if sizes[1] <= n_params <= sizes[5]:
                cut = plan_cut(config, n_params)
                assert shape_of(cut, get_family(cut)) == replace(shape, layers=layers)
    for outside in (sizes[1] - 1, sizes[6], sizes[5] + 1):
        with pytest.raises(ValueError, match=f"{sizes[1]:,}.* to {sizes[5]:,}"):
            plan_cut(config, outside)


@pytest.mark.parametrize(
    ("count", "text"), [(138_615_552, "138.6M"), (1_720_574_976, "1.72B"), (292_800, "292.8k"), (999, "999")]
)
def test_format_size(count: int, text: str) -> None:
    assert format_size(count) == text


def test_check_n_params_accepts_both_ends() -> None:
    check_n_params(10, 10, 20)
    check_n_params(20.0, 10, 20)
