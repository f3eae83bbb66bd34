"""Small configs of every architecture that is tested, with the options in which its checkpoints differ."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from ..models import VOCAB


TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GROUPED = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
PLAIN = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
# Where a class derives the head dimension: 48 channels, 6 heads of 8.
DERIVED = {name: value for name, value in GROUPED.items() if name != "head_dim"}
SHORT_WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
PARTIAL_ROPE = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}

# name -> (architecture, options). Sliding windows are shorter than the 16 tokens of the tests.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_layer": 3, "n_embd": 48, "n_head": 6, "n_positions": 64}),
    "gpt2-untied": (
        "gpt2",
        {"n_layer": 3, "n_embd": 48, "n_head": 6, "n_positions": 64, "n_inner": 80, "tie_word_embeddings": False},
    ),
    "gpt_neox": ("gpt_neox", {**PLAIN, "rope_parameters": {**PARTIAL_ROPE, "partial_rotary_factor": 0.25}}),
    "gpt_neox-sequential": (
        "gpt_neox",
        {**PLAIN, "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "gptj": ("gptj", {"n_layer": 3, "n_embd": 48, "n_head": 6, "n_positions": 64, "rotary_dim": 4, "n_inner": 80}),
    "opt": (
        "opt",
        {
            **{"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "ffn_dim": 80},
            **{"max_position_embeddings": 64, "word_embed_proj_dim": 48},
        },
    ),
    "opt-untied": (
        "opt",
        {
            **{"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "ffn_dim": 80},
            **{"max_position_embeddings": 64, "word_embed_proj_dim": 48, "tie_word_embeddings": False},
            "enable_bias": False,
        },
    ),
    "bloom": ("bloom", {"n_layer": 3, "hidden_size": 32, "n_head": 4}),
    "bloom-untied": ("bloom", {"n_layer": 3, "hidden_size": 32, "n_head": 4, "tie_word_embeddings": False}),
    "falcon-multi_query": (
        "falcon",
        {
            "num_hidden_layers": 3,
            "hidden_size": 48,
            "num_attention_heads": 6,
            "multi_query": True,
            "ffn_hidden_size": 80,
        },
    ),
    "falcon-new": (
        "falcon",
        {
            **{"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "num_kv_heads": 3},
            **{"new_decoder_architecture": True, "ffn_hidden_size": 80, "tie_word_embeddings": False},
        },
    ),
    "falcon-alibi": (
        "falcon",
        {
            **{"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "multi_query": False},
            **{"alibi": True, "parallel_attn": False, "bias": True},
        },
    ),
    "llama": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "llama-head_dim": ("llama", {**GROUPED, "head_dim": 6, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 5}),
    "qwen2": ("qwen2", {**DERIVED, "tie_word_embeddings": False}),
    "qwen2-windows": (
        "qwen2",
        {**DERIVED, "tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 1, **SHORT_WINDOWS},
    ),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-windows": ("qwen3", {**GROUPED, "use_sliding_window": True, **SHORT_WINDOWS}),
    "gemma": ("gemma", {**GROUPED, "num_key_value_heads": 1, "head_dim": 12}),
    "gemma-untied": ("gemma", {**GROUPED, "tie_word_embeddings": False}),
    "gemma2": (
        "gemma2",
        {**GROUPED, "head_dim": 12, "query_pre_attn_scalar": 7, "final_logit_softcapping": 3.0, **SHORT_WINDOWS},
    ),
    "gemma3_text": ("gemma3_text", {**GROUPED, "head_dim": 12, "query_pre_attn_scalar": 7, **SHORT_WINDOWS}),
    "phi": (
        "phi",
        {**PLAIN, "num_key_value_heads": 3, "rope_parameters": PARTIAL_ROPE},
    ),
    "phi-qk_norm": ("phi", {**PLAIN, "qk_layernorm": True, "tie_word_embeddings": True}),
    "phi3": ("phi3", {**DERIVED, "sliding_window": 5}),
    "phi3-partial": (
        "phi3",
        {**DERIVED, "partial_rotary_factor": 0.5, "rope_parameters": PARTIAL_ROPE, "tie_word_embeddings": True},
    ),
    "olmo2": ("olmo2", {**DERIVED}),
    # See test_one_epsilon_for_two_kinds_of_norms.
    "olmo2-tied": ("olmo2", {**DERIVED, "rms_norm_eps": 1e-8, "tie_word_embeddings": True, "attention_bias": True}),
    "granite": (
        "granite",
        {
            **DERIVED,
            **{"embedding_multiplier": 7.5, "logits_scaling": 3.3, "residual_multiplier": 0.23},
            **{"attention_multiplier": 0.17, "tie_word_embeddings": True, "mlp_bias": True},
        },
    ),
    "granite-untied": (
        "granite",
        {**DERIVED, "logits_scaling": 0.7, "residual_multiplier": 1.9, "tie_word_embeddings": False},
    ),
    "smollm3": ("smollm3", {**DERIVED, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "smollm3-windows": (
        "smollm3",
        {
            **DERIVED,
            "no_rope_layers": [1, 1, 0],
            "use_sliding_window": True,
            "tie_word_embeddings": False,
            **SHORT_WINDOWS,
        },
    ),
    "starcoder2": ("starcoder2", {**DERIVED, "sliding_window": 5}),
    "starcoder2-untied": ("starcoder2", {**DERIVED, "use_bias": False, "tie_word_embeddings": False}),
    "stablelm": ("stablelm", {**DERIVED, "rope_parameters": {**PARTIAL_ROPE, "partial_rotary_factor": 0.25}}),
    "stablelm-parallel": (
        "stablelm",
        {**DERIVED, "use_parallel_residual": True, "use_qkv_bias": True, "tie_word_embeddings": True},
    ),
    "cohere": ("cohere", {**DERIVED, "logit_scale": 0.37}),
    "cohere-qk_norm": ("cohere", {**DERIVED, "use_qk_norm": True, "logit_scale": 2.5, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5}),
    "qwen2_moe": (
        "qwen2_moe",
        {**DERIVED, **EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": ("qwen3_moe", {**GROUPED, **EXPERTS, "head_dim": 12}),
    "qwen3_moe-dense": (
        "qwen3_moe",
        {**GROUPED, **EXPERTS, "mlp_only_layers": [1], "tie_word_embeddings": True},
    ),
    # Norms without weights: their readers take the factor.
    "olmo": ("olmo", {**DERIVED}),
    "nanochat": ("nanochat", {**DERIVED, "tie_word_embeddings": False}),
    # One epsilon for the stream and for gated norms: the stream is scaled instead. Gated queries, linear attention.
    "qwen3_5_text": (
        "qwen3_5_text",
        {
            **{**GROUPED, "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        },
    ),
    # Latent attention, dense layers before the experts, a bias of the experts that is no parameter.
    "deepseek_v3": (
        "deepseek_v3",
        {
            **{**DERIVED, "num_key_value_heads": 6, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
            **{"q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
        },
    ),
}
"""Every case is small and unlike the miniature on which layouts are learned."""


def family_config(name: str, **options: Any) -> PretrainedConfig:
    """The config of a case of `CASES`, with further options."""
    kind, values = CASES[name]
    return CONFIG_MAPPING[kind](**{"vocab_size": VOCAB} | TOKENS | values | options)


__all__ = ["CASES", "family_config"]
