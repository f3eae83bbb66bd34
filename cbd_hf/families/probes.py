"""How every axis of every parameter follows the config: one dimension changed at a time, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cbd_hf.families.packings import Measured
from cbd_hf.layout import LayoutError, meta_model, weight_shapes


if TYPE_CHECKING:
    from transformers import PretrainedConfig

Shapes = dict[str, tuple[int, ...]]

# Attributes that some classes need at the hidden size or a part of it; set along with it where they were equal.
_FOLLOWERS = ("word_embed_proj_dim", "attention_hidden_size", "lru_width", "embedding_size", "embedding_dim")


@dataclass
class Probes:
    """
    What the probes found.

    Args:
        config (`PretrainedConfig`): the small config, with an explicit FFN width.
        axes (`dict[str, tuple[Measured, ...]]`): parameter -> its axes.
        fields (`dict[str, str]`): dimension -> config attribute, for the dimensions that move anything.
        inert (`tuple[str, ...]`): attributes that look like dimensions and move nothing.
        heads_fill_hidden (`bool`): hidden = heads x head_dim, whatever `head_dim` says; then `per["query"]` counts
            what moves with both, be it heads or channels.
        ffn_per_hidden (`int`, *optional*): FFN units per channel where the config leaves them open.
        follows_hidden (`tuple[str, ...]`): attributes that were set along with the hidden size.
    """

    config: PretrainedConfig
    axes: dict[str, tuple[Measured, ...]]
    fields: dict[str, str]
    inert: tuple[str, ...]
    heads_fill_hidden: bool
    ffn_per_hidden: int | None
    follows_hidden: tuple[str, ...] = ()
    eps_fields: tuple[str, ...] = field(default=())


def changed(config: PretrainedConfig, values: Mapping[str, Any]) -> PretrainedConfig:
    """A copy of `config` with these attributes."""
    return type(config).from_dict(config.to_dict() | dict(values))


def probe(config: PretrainedConfig, fields: Mapping[str, str], filled: bool = False) -> Probes:
    """
    Change one dimension of a small config at a time.

    Args:
        config (`PretrainedConfig`): from [`cbd_hf.layout.miniature.miniature`].
        fields (`Mapping[str, str]`): its dimensions.
        filled (`bool`, *optional*, defaults to `False`): take it that heads must fill the hidden size, although the
            sizes of the parameters would allow others.

    Raises:
        LayoutError: the parameters change with a dimension in a way that is not understood.
    """
    kept = dict(fields)
    config, ffn_per_hidden = _explicit_ffn(config, kept)
    base = weight_shapes(config)
    slopes: dict[str, Shapes] = {}
    inert = []
    for role in [role for role in kept if role == "ffn" or role.startswith("ffn:")]:
        name = kept[role]
        value = getattr(config, name)
        moved = _slope(base, config, {name: value + 16}, 16) if isinstance(value, int) and value > 0 else None
        if moved is None or not any(map(any, moved.values())):
            inert.append(kept.pop(role))
        else:
            slopes[role] = moved
    hidden, heads, kv_heads, head_dim = _heads(config, kept)
    if filled and ("heads" not in kept or heads * head_dim != hidden):
        raise LayoutError(f"{config.model_type}: its heads do not fill the hidden size.")
    explicit = None if filled else _explicit_heads(base, config, kept, head_dim) if "heads" in kept else {}
    if explicit is None and heads * head_dim != hidden:
        raise LayoutError(
            f"{config.model_type} cannot be resized: its parameters do not follow {kept['heads']} evenly although its "
            "heads are apart from its hidden size, so further attributes of the config must say how many there are."
        )
    if explicit is not None:
        slopes |= explicit
        followers = {name: 2 * hidden for name in _FOLLOWERS if getattr(config, name, None) == hidden}
        wider = {kept["hidden"]: 2 * hidden} | (_head_dim(config, head_dim) if "heads" in kept else {})
        slopes["hidden"], follows = _slope_with_followers(base, config, wider, followers, hidden)
    else:
        followers = {name: 2 * hidden for name in _FOLLOWERS if getattr(config, name, None) == hidden}
        doubled = {kept["hidden"]: 2 * hidden, kept["heads"]: 2 * heads}
        joint, follows = _slope_with_followers(base, config, doubled, followers, heads)
        if "kv_heads" in kept:
            if follows:
                doubled |= followers
            wide = weight_shapes(changed(config, doubled))
            slopes["key_value"] = _slope(wide, config, doubled | {kept["kv_heads"]: 2 * kv_heads}, kv_heads) or {}
            if not any(map(any, slopes["key_value"].values())):
                inert.append(kept.pop("kv_heads"))
                del slopes["key_value"]
        slopes["query"] = joint
    if "kv_heads" in fields and "kv_heads" not in kept and fields["kv_heads"] not in inert:
        inert.append(fields["kv_heads"])
    grouped = "key_value" in slopes
    counts = {"query": heads, "key_value": kv_heads, "hidden": hidden}
    axes = {}
    for name, shape in base.items():
        measured = []
        for dim, size in enumerate(shape):
            per = {role: slope[name][dim] for role, slope in slopes.items() if slope[name][dim]}
            used = sum(per[role] * int(counts.get(role) or getattr(config, kept[role])) for role in per)
            measured.append(Measured(per, size - used, head_dim, grouped))
        axes[name] = tuple(measured)
    return Probes(config, axes, kept, tuple(inert), explicit is None, ffn_per_hidden, follows, _eps_fields(config))


def _heads(config: PretrainedConfig, fields: Mapping[str, str]) -> tuple[int, int, int, int]:
    hidden = getattr(config, fields["hidden"])
    heads = getattr(config, fields["heads"]) if "heads" in fields else 1
    kv_heads = (getattr(config, fields["kv_heads"], None) if "kv_heads" in fields else None) or heads
    return hidden, heads, kv_heads, getattr(config, "head_dim", None) or hidden // heads


def _head_dim(config: PretrainedConfig, head_dim: int) -> dict[str, int]:
    if isinstance(getattr(type(config), "head_dim", None), property):
        return {}
    return {"head_dim": head_dim}


def _explicit_ffn(config: PretrainedConfig, fields: dict[str, str]) -> tuple[PretrainedConfig, int | None]:
    """The config with its FFN width written out, and units per channel where it was left open."""
    name = fields.get("ffn")
    if name is None or getattr(type(config)(), name, 0) is not None:
        return config, None
    # Also where it is written out: the other anchor of a chain may leave it open.
    written = changed(config, {name: 4 * getattr(config, fields["hidden"])})
    try:
        four = weight_shapes(changed(config, {name: None})) == weight_shapes(written)
    except Exception:  # the class no longer takes what it has by default
        four = False
    return (written if getattr(config, name) is None else config), 4 if four else None


def _slope(base: Shapes, config: PretrainedConfig, values: Mapping[str, Any], step: int) -> Shapes | None:
    """Entries per step of every axis, or `None` where the change is refused or alters the set of parameters."""
    try:
        shapes = weight_shapes(changed(config, values))
    except Exception:  # whatever the config or the model's constructor raises at sizes it does not allow
        return None
    if shapes.keys() != base.keys() or any(len(shapes[name]) != len(base[name]) for name in base):
        return None
    slopes = {}
    for name, shape in base.items():
        differences = [after - before for before, after in zip(shape, shapes[name], strict=True)]
        if any(difference % step for difference in differences):
            return None
        slopes[name] = tuple(difference // step for difference in differences)
    return slopes


def _explicit_heads(
    base: Shapes, config: PretrainedConfig, fields: dict[str, str], head_dim: int
) -> dict[str, Shapes] | None:
    """Slopes of query and key/value heads at a fixed hidden size; `None` where the heads must fill it."""
    _, heads, kv_heads, _ = _heads(config, fields)
    more = {fields["heads"]: 2 * heads} | _head_dim(config, head_dim)
    query = _slope(base, config, more, heads)
    if query is None or not any(map(any, query.values())) or any(v < 0 for slope in query.values() for v in slope):
        return None
    twice = {fields["hidden"]: 2 * getattr(config, fields["hidden"])} | _head_dim(config, head_dim)
    wider = _slope(base, config, twice, 1)
    if wider is not None and any(q and w for name in base for q, w in zip(query[name], wider[name], strict=True)):
        return None
    slopes = {"query": query}
    if "kv_heads" in fields:
        both = more | {fields["kv_heads"]: 2 * kv_heads}
        slope = _slope(weight_shapes(changed(config, more)), config, both, kv_heads)
        if slope is None:
            return None
        if any(map(any, slope.values())):
            slopes["key_value"] = slope
        else:
            fields.pop("kv_heads")
    return slopes


def _slope_with_followers(
    base: Shapes, config: PretrainedConfig, values: dict[str, Any], followers: dict[str, int], step: int
) -> tuple[Shapes, tuple[str, ...]]:
    slope = _slope(base, config, values | followers, step) if followers else _slope(base, config, values, step)
    if slope is None:
        raise LayoutError(
            f"{config.model_type} cannot be resized: its parameters do not follow {', '.join(values)} evenly, so "
            "further attributes of the config must depend on these."
        )
    return slope, tuple(followers)


def is_eps(name: str) -> bool:
    """Whether a config attribute is an epsilon, by its name."""
    return "eps" in name.split("_") or "epsilon" in name


def _eps_fields(config: PretrainedConfig) -> tuple[str, ...]:
    """Config attributes that reach the epsilon of a norm."""

    def epsilons(config: PretrainedConfig) -> list[float]:
        found = []
        for module in meta_model(config).modules():
            value = getattr(module, "eps", getattr(module, "variance_epsilon", None))
            if isinstance(value, float):
                found.append(value)
        return found

    names = [name for name, value in config.to_dict().items() if isinstance(value, float) and is_eps(name)]
    before = epsilons(config) if names else []
    return tuple(name for name in names if epsilons(changed(config, {name: 2 * getattr(config, name)})) != before)


__all__ = ["Probes", "changed", "is_eps", "probe"]
