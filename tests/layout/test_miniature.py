"""Miniatures are small models of the same architecture, with one layer of every kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from cbd_hf.layout.meta import count_parameters
from cbd_hf.layout.miniature import dimension_fields, miniature

from ..models import VOCAB, tiny_config


NEW_FALCON = {"new_decoder_architecture": True, "num_attention_heads": 128, "num_kv_heads": 8, "hidden_size": 8192}
GRANITE = {"embedding_multiplier": 12.0, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22}
MIXED = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # architecture, options, what the miniature has
    ("gpt2", {}, {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_inner": None}),
    ("bloom", {"hidden_size": 1024, "n_head": 16}, {"n_layer": 2, "n_head": 2, "hidden_size": 128}),
    ("falcon", {}, {"num_attention_heads": 4, "hidden_size": 256, "ffn_hidden_size": 48}),
    ("falcon", NEW_FALCON, {"num_attention_heads": 4, "num_kv_heads": 2, "hidden_size": 256}),
    ("opt", {"word_embed_proj_dim": 384}, {"hidden_size": 128, "word_embed_proj_dim": 64, "ffn_dim": 48}),
    ("granite", GRANITE, {"num_hidden_layers": 2}),
    ("gemma2", {}, {"layer_types": ["sliding_attention", "full_attention"], "num_key_value_heads": 2}),
    ("gemma4_text", {}, {"per_layer_config": {"1": {"head_dim": 512}}}),
    ("gemma", {"hidden_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 1}, {"num_key_value_heads": 1}),
    ("smollm3", {}, {"no_rope_layers": [1, 0]}),
    ("qwen3_moe", MIXED, {"mlp_only_layers": [2], "num_local_experts": 4, "num_hidden_layers": 3}),
    ("deepseek_v3", {}, {"first_k_dense_replace": 1, "num_hidden_layers": 2, "n_group": 2, "topk_group": 1}),
    ("gpt_neo", {}, {"attention_layers": ["global", "local"], "num_layers": 2}),
    ("jamba", {}, {"num_hidden_layers": 5}),  # mamba, mamba with experts, ..., attention
    ("mamba2", {}, {"num_heads": 2, "hidden_size": 64}),
    ("bart", {}, {"decoder_layers": 2, "d_model": 128, "decoder_ffn_dim": 48}),
]
STRUCTURE = (
    *("hidden_act", "activation_function", "attention_bias", "mlp_bias", "tie_word_embeddings", "rope_parameters"),
    *("sliding_window", "query_pre_attn_scalar", "head_dim", "embedding_multiplier", "attention_multiplier", "alibi"),
    *("multi_query", "parallel_attn", "new_decoder_architecture", "use_qk_norm", "expert_layer_period", "model_type"),
)


def default(kind: str, **options: Any) -> PretrainedConfig:
    return CONFIG_MAPPING[kind](**options)


@pytest.mark.parametrize(("kind", "options", "expected"), CASES)
def test_miniature(kind: str, options: dict[str, Any], expected: dict[str, Any]) -> None:
    config = default(kind, **options)
    before = config.to_json_string(use_diff=False)
    small = miniature(config)
    assert config.to_json_string(use_diff=False) == before
    assert type(small) is type(config)
    old, new = json.loads(before), json.loads(small.to_json_string(use_diff=False))
    assert {name: new[name] for name in expected} == expected
    for name in STRUCTURE:
        assert new.get(name) == old.get(name), name
    assert type(small).from_dict(small.to_dict()).to_dict() == small.to_dict()

    model = AutoModelForCausalLM.from_config(
        small, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 10_000_000
    with torch.no_grad():
        logits = model(input_ids=torch.randint(2, 60, (2, 12)), use_cache=False).logits
    assert logits.shape[:2] == (2, 12) and torch.isfinite(logits).all()

    fields = dimension_fields(small)
    assert fields == dimension_fields(config)
    widths = [new[name] for key, name in fields.items() if key == "hidden" or key.startswith("ffn")]
    assert len({*widths, new[fields["vocab"]]}) == len(widths) + 1
    if "heads" in fields:
        assert new[fields["hidden"]] % new[fields["heads"]] == 0
        assert "kv_heads" not in fields or new[fields["heads"]] % new[fields["kv_heads"]] == 0


def test_fields() -> None:
    assert dimension_fields(default("llama")) == {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "vocab": "vocab_size",
        "positions": "max_position_embeddings",
        "ffn": "intermediate_size",
    }
    gpt2 = dimension_fields(default("gpt2"))
    assert (gpt2["layers"], gpt2["hidden"], gpt2["ffn"], gpt2["positions"]) == (
        *("n_layer", "n_embd", "n_inner"),
        "n_positions",
    )
    assert not {"kv_heads", "head_dim"} & set(gpt2)
    assert "kv_heads" not in dimension_fields(default("falcon"))
    assert dimension_fields(default("falcon", multi_query=False))["kv_heads"] == "num_kv_heads"
    assert not {"ffn", "kv_heads", "positions"} & set(dimension_fields(default("bloom")))
    moe = dimension_fields(default("qwen2_moe"))
    assert {name for key, name in moe.items() if key.startswith("ffn")} == {
        *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    }
    assert moe["ffn:moe_intermediate_size"] == "moe_intermediate_size"
    assert dimension_fields(default("bart"))["heads"] == "decoder_attention_heads"
    assert "head_dim" not in dimension_fields(default("gemma4_text"))  # differs between layers


def test_equality_of_hidden_and_heads() -> None:
    """Kept where the class derives the head dimension, or where it held; not made where it did not hold."""
    assert miniature(default("cohere")).hidden_size == 256
    assert miniature(LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)).hidden_size == 256
    small = miniature(LlamaConfig(hidden_size=5120, num_attention_heads=32, head_dim=128))
    assert (small.hidden_size, small.num_attention_heads, small.head_dim) == (64, 2, 128)


def test_tiny_original() -> None:
    config = tiny_config("llama", layers=1)
    small = miniature(config)
    assert (small.num_hidden_layers, small.vocab_size, small.num_key_value_heads) == (1, VOCAB, 2)
    assert count_parameters(small) < 100_000


@pytest.mark.parametrize("kind", ["gemma3", "llama4"])
def test_multimodal_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="multimodal; use its text config"):
        miniature(default(kind))
    miniature(default(kind).get_text_config())


def test_reason_of_a_failure() -> None:
    with pytest.raises(ValueError, match="dbrx has no miniature: .*rope_theta"):
        miniature(default("dbrx"))  # transformers cannot build a model from its defaults
