"""Configs whose weights may be mixed, and those whose function differs by more than a dimension."""

from __future__ import annotations

from typing import Any

import pytest

from cbd_hf.families import check_same_family, get_family

from ..models import tiny_config
from .configs import SHORT_WINDOWS, family_config


def rope(theta: float, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | options}


@pytest.mark.parametrize(
    ("name", "field", "options"),
    [
        ("mistral", "sliding_window", {"sliding_window": 6}),
        ("qwen2-windows", "sliding_window", {"sliding_window": 9}),
        ("llama", "rope_parameters", rope(5e5)),
        ("llama", "rope_parameters|max_position_embeddings", rope(1e4, rope_type="linear", factor=2.0)),
        ("gptj", "rotary_dim", {"rotary_dim": 8}),
        ("llama", "hidden_act", {"hidden_act": "gelu"}),
        ("gpt2", "activation_function", {"activation_function": "relu"}),
        ("cohere", "logit_scale", {"logit_scale": 0.5}),
        ("granite", "logits_scaling", {"logits_scaling": 3.4}),
        ("granite", "residual_multiplier", {"residual_multiplier": 0.5}),
        ("gemma2", "query_pre_attn_scalar", {"query_pre_attn_scalar": 8}),
        ("gemma2", "final_logit_softcapping", {"final_logit_softcapping": None}),
        ("mixtral", "num_local_experts", {"num_local_experts": 4}),
        ("qwen3_moe", "num_experts|num_local_experts", {"num_experts": 4}),
        ("qwen3_moe", "num_experts_per_tok", {"num_experts_per_tok": 1}),
        ("qwen3_moe", "norm_topk_prob", {"norm_topk_prob": False}),
        ("llama", "attention_bias", {"attention_bias": True}),
        ("llama", "mlp_bias", {"mlp_bias": True}),
        ("llama", "head_dim", {"head_dim": 12}),
        ("gpt2", "head_dim", {"n_head": 3}),
        ("llama", "vocab_size", {"vocab_size": 80}),
        ("llama", "tie_word_embeddings", {"tie_word_embeddings": False}),
        ("gpt2", "the number of positions", {"n_positions": 32}),
        ("falcon-multi_query", "alibi", {"alibi": True}),
        ("cohere", "use_qk_norm", {"use_qk_norm": True}),
    ],
)
def test_other_functions_are_refused(name: str, field: str, options: dict[str, Any]) -> None:
    """By name, with both values, in either order."""
    one, other = family_config(name), family_config(name, **options)
    for pair in ((one, other), (other, one)):
        with pytest.raises(ValueError, match=f"must agree in ({field}), got .* and "):
            check_same_family(*pair)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "falcon-new"])
def test_what_does_not_shape_the_function(name: str) -> None:
    """Dropouts, token ids, how it is run and trained."""
    one = family_config(name)
    other = family_config(
        name,
        bos_token_id=5,
        eos_token_id=6,
        pad_token_id=7,
        use_cache=False,
        initializer_range=0.3,
        attention_dropout=0.3,
        hidden_dropout=0.3,
        attn_pdrop=0.3,
        resid_pdrop=0.3,
        embd_pdrop=0.3,
        dtype="bfloat16",
        architectures=["Mine"],
        router_aux_loss_coef=0.5,
        output_router_logits=True,
        cbd={"anchor": "small"},
        task_specific_params={"text-generation": {"do_sample": True}},
    )
    assert check_same_family(one, other) == get_family(one)
    assert check_same_family(other, one) == get_family(one)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon-new", "llama", "qwen2_moe", "opt"])
def test_dimensions_may_differ(name: str) -> None:
    """Also the limit of rotary positions, and the epsilon of the norms, which is scaled with the width."""
    one = family_config(name)
    family = get_family(one)
    values = {key: 2 * getattr(one, key) for key in family.eps_fields}
    values |= {name: 2 * getattr(one, name) for role, name in family.fields.items() if role.startswith("ffn")
               and getattr(one, name) is not None}  # fmt: skip
    if name not in ("gpt2", "opt"):  # learned positions
        values["max_position_embeddings"] = 128
    other = type(one).from_dict(one.to_dict() | values)
    assert check_same_family(one, other).tensors == family.tensors


def test_a_limit_that_scales_the_rotation_counts() -> None:
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    one, other = (tiny_config("llama", rope_parameters=scaled, max_position_embeddings=length) for length in (64, 128))
    with pytest.raises(ValueError, match="must agree in max_position_embeddings, got 64 and 128"):
        check_same_family(one, other)


def test_another_architecture() -> None:
    with pytest.raises(ValueError, match="one architecture, got 'llama' and 'mistral'"):
        check_same_family(family_config("llama"), family_config("mistral"))


def test_kinds_of_layers_are_no_reason() -> None:
    """They are aligned layer by layer; see cbd_hf.sizing.corresponding_layers."""
    deep = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": SHORT_WINDOWS["sliding_window"],
    }
    check_same_family(family_config("gemma2"), family_config("gemma2", **deep))
