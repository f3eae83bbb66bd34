"""Whether two configs can be neighbours in a chain."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cbd_hf.families.learn import get_family
from cbd_hf.layout import Family, per_layer_lists, shape_of
from cbd_hf.layout.shape import INDEX_LISTS, layer_counts


if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What a config says beside the function of its model: names, tokens, training, how it is run. `use_sliding_window` and
# the like stay: everything else must agree.
_BESIDE = re.compile(
    r"(^_|_token_ids?$|dropout|pdrop$|initializer|^(architectures|transformers_version|model_type|dtype|torch_dtype|"
    r"use_cache|id2label|label2id|problem_type|task_specific_params|return_dict|output_.*|chunk_size_feed_forward|"
    r"summary_.*|pretraining_tp|use_bfloat16|n_ctx|cbd|max_window_layers|router_aux_loss_coef|router_jitter_noise|"
    r"quantization_config|is_encoder_decoder|finetuning_task|num_labels|auto_map|gradient_checkpointing|"
    r"max_position_embeddings|original_max_position_embeddings|use_flash_attn|init_method|init_std)$)"
)


def check_same_family(first: PretrainedConfig, second: PretrainedConfig) -> Family:
    """
    The common layout of two configs whose weights are to be mixed.

    Raises:
        LayoutError: the architecture cannot be resized.
        ValueError: they differ in architecture, vocabulary, head dimension, positions or another attribute that may
            shape the function; names the attribute and both values.
    """
    if first.model_type != second.model_type:
        raise ValueError(
            f"A chain holds one architecture, got {first.model_type!r} and {second.model_type!r}. Reach another one "
            "by bridge distillation."
        )
    family = get_family(first)
    other = get_family(second)
    a, b = shape_of(first, family), shape_of(second, family)
    named: list[tuple[str, Any, Any]] = [
        ("vocab_size", a.vocab, b.vocab),
        *([("head_dim", a.head_dim, b.head_dim)] if "heads" in family.fields else []),
        ("the number of positions", _positions(first, family), _positions(second, family)),
    ]
    ours, theirs = (_function(config, family) for config in (first, second))
    named += [
        (name, ours.get(name), theirs.get(name)) for name in sorted(ours.keys() | theirs.keys(), key=_named_first)
    ]
    for label, one, two in named:
        if one != two:
            raise ValueError(
                f"Two models of one chain must agree in {label}, got {one!r} and {two!r}: their weights cannot be "
                "mixed. Choose anchors that share it."
            )
    if family.tensors != other.tensors:
        names = sorted(
            name
            for name in family.tensors.keys() | other.tensors.keys()
            if family.tensors.get(name) != other.tensors.get(name)
        )
        raise ValueError(f"The two configs differ in the layout of {', '.join(names)}, so they cannot be mixed.")
    return family


def _named_first(name: str) -> tuple[bool, str]:
    """Positions are compared because of the rope's type; a difference in that is to be named itself."""
    return name == "max_position_embeddings", name


def _positions(config: PretrainedConfig, family: Family) -> int | None:
    """Rows of learned position embeddings; `None` with rotary ones, whose limit is no dimension."""
    name = family.fields.get("positions")
    learned = any("position" in local or local.endswith("wpe.weight") for local in family.tensors)
    return getattr(config, name, None) if name and learned else None


def _function(config: PretrainedConfig, family: Family) -> dict[str, Any]:
    """Attributes that shape the function and are no dimension of the chain."""
    layers = getattr(config, family.fields["layers"])
    beside = {*family.fields.values(), *family.eps_fields, *family.inert, *family.follows_hidden, "head_dim"}
    beside |= {*per_layer_lists(config, layers), *INDEX_LISTS, *layer_counts(config, layers)}  # aligned layer by layer
    values = {
        name: value for name, value in config.to_dict().items() if name not in beside and not _BESIDE.search(name)
    }
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type", "default") != "default":
        values["max_position_embeddings"] = getattr(config, "max_position_embeddings", None)
    return values


__all__ = ["check_same_family"]
