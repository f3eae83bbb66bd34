"""A very small config of the same architecture, on which a layout can be inferred and proved by real forwards."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from cbd_hf.layout.meta import parameter_shapes
from cbd_hf.layout.shape import INDEX_LISTS, LAYER_COUNTS


if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_LAYERS = 8

# Names by preference, before `attribute_map`. A decoder's own come first: standard ones may be an encoder's.
_NAMES = {
    "layers": "decoder_layers num_decoder_layers num_layers_per_stack num_hidden_layers num_layers",
    "hidden": "hidden_size",
    "heads": "decoder_attention_heads num_decoder_attention_heads num_attention_heads",
    "kv_heads": "num_key_value_heads num_kv_heads",
    "head_dim": "head_dim dim_head d_head attention_head_size",
    "vocab": "decoder_vocab_size vocab_size",
    "positions": "max_target_positions max_position_embeddings max_seq_len",
    "ffn": "decoder_ffn_dim intermediate_size ffn_hidden_size",
}
_FFN = re.compile(
    r"(?!encoder)(.*_)?(intermediate_size(_mlp)?|(ffn|ffn_hidden|feed_forward)_(dim|size)|d(ff|im_ff|_inner)|n_inner)"
)
# Largest values of other sizes.
_CAPS = {
    r"(moe_)?(num|n)_(local_|routed_)?experts|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|(moe_)?(num|n)_shared_experts|topk_group": 2,
    r"n_group|num_expert_group|(mamba_)?n_groups|o_groups|index_n_heads|linear_num(_key)?_heads|swa_num_key_.*": 2,
    r"q_lora_rank": 40,
    r"kv_lora_rank": 32,
    r"o_lora_rank|hc_lowrank|hidden_size_per_layer_input": 24,
}
# Proportional to the hidden size.
_FOLLOW = re.compile(
    r"hidden_size|attention_hidden_size|((in|out)put_)?embedding_(size|dim)|axial_pos_embds_dim|lru_width|(mamba_dt|"
    r"time_step)_rank|mamba_(d_ssm|headdim|n_heads|num_heads)|ple_embed_dim|word_embed_proj_dim"
)
# Query heads that are a multiple of key/value heads.
_GROUPS = {"swa_num_attention_heads": "swa_num_key_value_heads", "linear_num_value_heads": "linear_num_key_heads"}
# One entry per layer; counts of first and of last layers unlike others.
_PER_LAYER = re.compile(r"(?!mtp).*(layer|_types$|_pattern$|intermediate_size$)")
_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_LAST = ("num_kv_shared_layers",)


def dimension_fields(config: PretrainedConfig) -> dict[str, str]:
    """
    Dimension -> the attribute of `config` that holds it.

    Dimensions are layers, hidden, heads, kv_heads, head_dim, vocab, positions, ffn and, for further widths of
    feed-forward networks or experts, `ffn:<attribute>`. One that the class has no attribute for, that its models
    ignore, or that `per_layer_config` varies is absent.
    """
    values = config.to_dict()
    varied = {name for part in (values.get("per_layer_config") or {}).values() for name in part}
    return {key: name for key, name in _fields(config, values).items() if name not in varied}


def miniature(config: PretrainedConfig) -> PretrainedConfig:
    """
    A very small config of `config`'s architecture with its structural options; `config` is not modified.

    Shrinks layers to one of every kind (2 to 8), key/value heads to 2, query heads per key/value head to 2, experts to
    4, widths of feed-forward networks to different multiples of 16, vocabulary, learned positions and low ranks. The
    hidden size becomes heads x head_dim if it was (and if that is at most 512 or the class has no head_dim), else
    about 64. Head dimensions and whatever is not a size stay.

    Raises:
        ValueError: the config nests others, or no model can be built; says why.
    """
    nested = sorted(set(config.sub_configs) - {"attn_config", "ffn_config"})
    if nested:
        advice = "multimodal; use its text config" if "text_config" in nested else "not one decoder of text"
        raise ValueError(f"{config.model_type} has no miniature: it is {advice} (holds {', '.join(nested)}).")
    try:
        return _shrink_layers(config, *_shrink_widths(config))
    except Exception as error:  # of the class's validation, or of building the model
        reason = f"{type(error).__name__}: {error}. Can a model be built from the config?"
        raise ValueError(f"{config.model_type} has no miniature: {reason}") from error


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _multi_query(values: dict[str, Any]) -> bool:
    return bool(values.get("multi_query")) and not values.get("new_decoder_architecture")


def _is_mamba(values: dict[str, Any]) -> bool:
    return "state_size" in values and "expand" in values


def _fields(config: PretrainedConfig, values: dict[str, Any]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for dimension, names in _NAMES.items():
        real = [config.attribute_map.get(name, name) for name in names.split()]
        fields |= {dimension: name for name in reversed(real) if name in values}  # noqa: B035
    if _multi_query(values) or fields.get("kv_heads", "").startswith("encoder"):
        fields.pop("kv_heads", None)  # always one, or those of Whisper's encoder
    if _is_mamba(values):  # no attention; the inner width is expand x hidden
        return {key: name for key, name in fields.items() if key not in ("ffn", "head_dim")}
    found = [name for name in values if _FFN.fullmatch(name)]
    if found:
        fields.setdefault("ffn", found[0])
    return fields | {f"ffn:{name}": name for name in found if name != fields["ffn"]}


def _shrink_widths(config: PretrainedConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """All values with everything but layers shrunk, and the dimension fields."""
    old = config.to_dict()
    fields = _fields(config, old)
    before = old[fields["hidden"]]
    follow = {name for name in old if _FOLLOW.fullmatch(name)} | {fields["hidden"], "hidden_size"}
    follow |= {"intermediate_size", "num_heads"} if _is_mamba(old) else set()
    hidden, multiple, taken, caps = 0, 16, set(), dict(_CAPS)
    heads_before = old.get(fields.get("heads", ""))
    if heads_before:
        kv_before = 1 if _multi_query(old) else old.get(fields.get("kv_heads", "")) or heads_before
        own = old.get(fields.get("head_dim", ""))
        head_dim = own or before // heads_before
        kv = min(kv_before, 4 if config.model_type == "codegen" else 2)  # laid out for four devices
        heads = kv * min(heads_before // kv_before, 4 if kv == 1 and head_dim <= 128 else 2)
        inner = old.get("attention_hidden_size", before)
        if heads_before * head_dim == inner and not (own and inner == before and heads * head_dim > 512):
            hidden = heads * head_dim * before // inner
        multiple, taken = math.lcm(8, 2 * heads), {head_dim, heads * head_dim, kv * head_dim}
        caps["num_key_value_heads|num_kv_heads|kv_n_heads"] = kv
        caps[f"{fields['heads']}|encoder_attention_heads|num_(encoder_)?attention_heads"] = heads
    counts = [old[name] for name in follow if name.endswith("_heads") and _size(old.get(name))]
    hidden = hidden or next(
        size
        for size in itertools.count(64, 8)
        if size not in taken and size % multiple == 0 and not any(size * count % (2 * before) for count in counts)
    )
    taken.add(hidden)
    vocab, positions = (next(size for size in range(top, 0, -8) if size not in taken) for top in (96, 64))
    caps |= {".*vocab_size.*": vocab, ".*_token_(id|index)": vocab - 1}
    if not old.get("rope_parameters"):
        caps[f"{fields.get('positions')}|n_ctx"] = positions
    free = (width for width in itertools.count(48, 32) if width not in taken | {vocab, positions})
    widths: defaultdict[tuple[str, int], int] = defaultdict(lambda: next(free))

    def shrink(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shrink(key, part) for key, part in value.items()}
        if isinstance(value, list):
            return [shrink(name, item) for item in value]
        if not _size(value):
            return value
        if name in follow:
            return max(1, hidden * value // before)
        if _FFN.fullmatch(name):
            return widths[name, value]
        return min([value, *(cap for pattern, cap in caps.items() if re.fullmatch(pattern, name))])

    parts = {*config.sub_configs, "per_layer_config"}  # not rope's
    values = {k: v if isinstance(v, dict) and k not in parts else shrink(k, v) for k, v in old.items()}
    for name, kv_name in _GROUPS.items():
        if _size(old.get(kv_name)):
            values[name] = values[kv_name] * min(old[name] // old[kv_name], 2)
    if old.get("topk_group") and old["topk_group"] < old[config.attribute_map.get("n_group", "n_group")]:
        values["topk_group"] = 1
    if varied := old.get("num_attention_heads_per_layer"):
        small = {count: heads + kv * i for i, count in enumerate(sorted({*varied, heads_before}))}
        values["num_attention_heads_per_layer"] = [small[count] for count in varied]
        values[fields["heads"]] = small[heads_before]
    return values, fields


def _layer_names(config: PretrainedConfig, layers: int) -> list[frozenset[str]]:
    """Every layer's parameters, in all lists that have a part of each; without numbers."""
    found: dict[str, list[set[str]]] = {}
    for name in parameter_shapes(config):
        prefix, *numbered = re.split(r"\.(\d+)\.", name)  # of the layer, then of heads or experts
        if numbered and int(numbered[0]) < layers:
            parts = found.setdefault(prefix, [set() for _ in range(layers)])
            parts[int(numbered[0])].add(".".join([prefix, *numbered[1::2]]))
    lists = [parts for parts in found.values() if all(parts)]
    return [frozenset().union(*(parts[i] for parts in lists)) for i in range(layers)]


def _shrink_layers(config: PretrainedConfig, values: dict[str, Any], fields: dict[str, str]) -> PretrainedConfig:
    layers = values[fields["layers"]] if "layers" in fields else config.num_hidden_layers  # counted from a list
    every = range(layers)
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == layers
        if name not in INDEX_LISTS and _PER_LAYER.match(name)
    }
    overrides = {int(index): part for index, part in (values.get("per_layer_config") or {}).items()}
    marks = {name: {i - base for i in values[name]} for name, base in INDEX_LISTS.items() if values.get(name)}
    marks |= {name: set(every[: values[name]]) for name in _FIRST if _size(values.get(name))}
    marks |= {name: set(every[-values[name] :]) for name in _LAST if _size(values.get(name))}

    def build(picked: list[int]) -> PretrainedConfig:
        count = len(picked)
        result = values | {name: [items[i] for i in picked] for name, items in lists.items()}
        for name in (fields.get("layers", ""), *LAYER_COUNTS):
            if _size(values.get(name)):
                result[name] = values[name] // layers * count or count
        if overrides:
            result["per_layer_config"] = {new: overrides[i] for new, i in enumerate(picked) if i in overrides}
        for name, marked in marks.items():
            new = [index for index, i in enumerate(picked, INDEX_LISTS.get(name, 0)) if i in marked]
            result[name] = new if name in INDEX_LISTS else len(new)
        return type(config).from_dict(result)

    names = _layer_names(build(list(every)), layers)
    kinds: dict[Any, int] = {}
    for i in every:
        own = [items[i] for items in lists.values()], [i in marked for marked in marks.values()], overrides.get(i)
        kinds.setdefault((names[i], repr(own)), i)
    chosen = list(kinds.values())[:MAX_LAYERS] if len(kinds) > 1 else list(every[:2])
    small = build(chosen)
    if set(names) - set(_layer_names(small, len(chosen))) and chosen[-1] < MAX_LAYERS:
        return build(list(every[: chosen[-1] + 1]))  # layers differ by their index in some other way
    return small


__all__ = ["dimension_fields", "miniature"]
