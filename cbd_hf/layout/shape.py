"""The dimensions of a causal LM that a chain varies, read from and written to its Hugging Face config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cbd_hf.layout.family import LayoutError
from cbd_hf.layout.meta import weight_shapes


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cbd_hf.layout.axes import Axis, Segment
    from cbd_hf.layout.family import Family


@dataclass(frozen=True)
class Shape:
    """
    Dimensions of one model.

    Args:
        layers (`int`): decoder layers.
        hidden (`int`): width of the residual stream.
        heads (`int`): query heads.
        kv_heads (`int`): key/value heads; equals `heads` without grouping.
        head_dim (`int`): channels per head.
        ffn (`int`): units of one feed-forward network; 0 where the family has only the `extra` ones.
        vocab (`int`): rows of the embedding, padding included.
        positions (`int`): learned position embeddings; 0 where the family has none.
        extra (`tuple[tuple[str, int], ...]`): further widths, `("ffn:moe_intermediate_size", 768)`: the units of one
            expert, of the shared expert.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int = 0
    extra: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads cannot be shared evenly by {self.kv_heads} key/value heads: choose a "
                "multiple of the key/value heads."
            )

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def widths(self) -> dict[str, int]:
        """Every dimension but the number of layers, by name."""
        values = {"hidden": self.hidden, "heads": self.heads, "kv_heads": self.kv_heads, "ffn": self.ffn}
        return values | dict(self.extra)

    def count(self, role: str) -> int:
        """Number of parts of a role: channels, heads or units; see [`Segment`]."""
        if role.startswith("ffn:"):
            return dict(self.extra)[role]
        return {
            "hidden": self.hidden,
            "query": self.heads,
            "key_value": self.kv_heads,
            "group": self.kv_heads,
            "ffn": self.ffn,
            "fixed": 1,
        }[role]

    def size_of(self, segment: Segment) -> int:
        """Number of entries of a segment of an axis."""
        unit = segment.unit
        if segment.role == "group":  # the group's query heads, its key, its value
            unit *= self.group + 2
        return self.count(segment.role) * unit

    def length(self, axis: Axis) -> int:
        """Number of entries along an axis."""
        return sum(map(self.size_of, axis.segments))


def shape_of(config: PretrainedConfig, family: Family) -> Shape:
    """The [`Shape`] that `config` describes."""
    fields = family.fields
    heads = getattr(config, fields["heads"]) if "heads" in fields else 1
    hidden = getattr(config, fields["hidden"])
    kv_heads = getattr(config, fields["kv_heads"], None) if "kv_heads" in fields else None
    head_dim = getattr(config, "head_dim", None)
    ffn = getattr(config, fields["ffn"], None) if "ffn" in fields else 0
    if ffn is None or family.ffn_per_hidden and "ffn" not in fields:
        ffn = (family.ffn_per_hidden or 0) * hidden  # GPT-2 writes None for 4 x hidden, BLOOM nothing
    return Shape(
        layers=getattr(config, fields["layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        ffn=ffn,
        vocab=config.vocab_size,
        positions=getattr(config, fields["positions"], None) or 0 if "positions" in fields else 0,
        extra=tuple((role, getattr(config, name)) for role, name in sorted(fields.items()) if role.startswith("ffn:")),
    )


def per_layer_lists(config: PretrainedConfig, layers: int) -> dict[str, list[Any]]:
    """The config's attributes that hold one value for each layer: `layer_types`, `no_rope_layers`, ..."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == layers and "token" not in name and name not in _NOT_STRUCTURE
        if name not in INDEX_LISTS
    }


def layer_counts(config: PretrainedConfig, layers: int) -> list[str]:
    """The config's attributes, of [`LAYER_COUNTS`], that repeat the number of layers."""
    values = config.to_dict()
    return [name for name in LAYER_COUNTS if values.get(name) == layers]


def layer_kinds(config: PretrainedConfig, family: Family) -> list[tuple[Any, ...]]:
    """
    For each layer, what the config says about it alone, and the names of its parameters where layers differ in them.
    Layers of one kind do the same with their weights.
    """
    layers = getattr(config, family.fields["layers"])
    lists = per_layer_lists(config, layers)
    kinds = [tuple(str(values[index]) for values in lists.values()) for index in range(layers)]
    if family.uniform:
        return kinds
    names = _names_by_layer(_Described(config), family.layer_prefix)
    return [(*kind, *names.get(layer, ())) for layer, kind in enumerate(kinds)]


class _Described:
    """A config that is equal to any other with the same values."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.values = json.dumps(config.to_dict() | {"class": type(config).__name__}, sort_keys=True, default=str)

    def __hash__(self) -> int:
        return hash(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Described) and self.values == other.values


@lru_cache(maxsize=64)
def _names_by_layer(described: _Described, layer_prefix: str) -> dict[int, tuple[str, ...]]:
    """Layer -> the names of its parameters."""
    names: dict[int, list[str]] = {}
    for name in weight_shapes(described.config):
        if name.startswith(layer_prefix):
            layer, _, local = name.removeprefix(layer_prefix).partition(".")
            names.setdefault(int(layer), []).append(local)
    return {layer: tuple(sorted(of_layer)) for layer, of_layer in names.items()}


def config_with_shape(
    config: PretrainedConfig, shape: Shape, family: Family, layers: Sequence[int] | None = None
) -> PretrainedConfig:
    """
    A copy of `config` with the dimensions of `shape`.

    Args:
        config (`PretrainedConfig`): of the family.
        shape (`Shape`): the dimensions; `head_dim`, `vocab` and `positions` are those of `config`.
        family (`Family`): its layout.
        layers (`Sequence[int]`, *optional*): for each layer of the result, the layer of `config` whose kind it is.
            Needed where `config` mixes kinds of layers and the number of layers changes.

    Raises:
        LayoutError: the family ties dimensions that `shape` does not, or its layers have mixed types and `layers` is
            not given.
    """
    fields = family.fields
    if family.heads_fill_hidden and shape.heads * shape.head_dim != shape.hidden:
        raise LayoutError(
            f"{config.model_type} needs hidden size = heads x head_dim, got {shape.hidden} and {shape.heads} x "
            f"{shape.head_dim}: change one of them."
        )
    if family.ffn_per_hidden and "ffn" not in fields and shape.ffn != family.ffn_per_hidden * shape.hidden:
        raise LayoutError(
            f"{config.model_type} has {family.ffn_per_hidden} FFN units per channel, got {shape.ffn} and "
            f"{shape.hidden}: change one of them."
        )
    values: dict[str, Any] = config.to_dict()
    depth = values[fields["layers"]]
    if shape.layers != depth or layers is not None:
        values |= _layer_lists(config, family, shape.layers, layers)
    values |= dict.fromkeys(layer_counts(config, depth), shape.layers)
    values[fields["layers"]] = shape.layers
    values[fields["hidden"]] = shape.hidden
    for name in family.follows_hidden:
        values[name] = shape.hidden
    if "heads" in fields:
        # Key/value heads that move no parameter (latent attention) still say how heads are repeated.
        repeated = [name for name in family.inert if "heads" in name and values.get(name) == values[fields["heads"]]]
        values |= dict.fromkeys([fields["heads"], *repeated], shape.heads)
        # Falcon's num_kv_heads where every head has its own: no parameter follows it, but its forward does.
        values |= {
            n: shape.heads
            for n in family.inert
            if n.endswith("_heads") and values[n] == getattr(config, fields["heads"])
        }
    if "kv_heads" in fields and (values.get(fields["kv_heads"]) is not None or shape.kv_heads != shape.heads):
        values[fields["kv_heads"]] = shape.kv_heads
    if "ffn" in fields:
        usual = family.ffn_per_hidden is not None and shape.ffn == family.ffn_per_hidden * shape.hidden
        # None as the family's own checkpoints write it
        values[fields["ffn"]] = None if usual and values.get(fields["ffn"]) is None else shape.ffn
    for role, count in shape.extra:
        values[fields[role]] = count
    own_head_dim = values.get("head_dim")
    if "heads" in fields and not family.heads_fill_hidden:
        if own_head_dim is None and shape.hidden // shape.heads != shape.head_dim:
            values["head_dim"] = shape.head_dim
    for key in ("_name_or_path", "architectures", "transformers_version"):
        values.pop(key, None)
    try:
        return type(config).from_dict(values)
    except Exception as error:  # of the class's own validation
        raise LayoutError(f"{config.model_type} does not allow {shape}: {error}") from error


INDEX_LISTS = dict.fromkeys(
    ("attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids", "local_layer_ids", "mlp_only_layers", "moe_layers"), 0
) | {"ple_layer_ids": 1}
"""Config attributes that list the layers of one kind by their index -> the first layer's."""

LAYER_COUNTS = ("encoder_layers", "num_encoder_layers", "num_blocks", "num_hidden_layers")
"""Config attributes beside the decoder's own that may say how many layers there are; caches are made by them."""

_NOT_STRUCTURE = frozenset({"architectures", "id2label", "label2id", "keys_to_ignore_at_inference"})


def _layer_lists(
    config: PretrainedConfig, family: Family, count: int, layers: Sequence[int] | None
) -> dict[str, list[Any]]:
    lists = per_layer_lists(config, getattr(config, family.fields["layers"]))
    mixed = {name: values for name, values in lists.items() if any(value != values[0] for value in values)}
    if layers is None and mixed:
        name, values = next(iter(mixed.items()))
        raise LayoutError(
            f"This {config.model_type} mixes kinds of layers ({name}: {sorted(set(map(str, values)))}); say which "
            "layers of it the others follow (`layers`)."
        )
    chosen = list(layers) if layers is not None else [0] * count
    if len(chosen) != count:
        raise LayoutError(f"{len(chosen)} layers are named for a shape of {count}.")
    result = {name: [values[index] for index in chosen] for name, values in lists.items()}
    for name, base in INDEX_LISTS.items():
        marked = getattr(config, name, None)
        if isinstance(marked, list):
            result[name] = [new + base for new, old in enumerate(chosen) if old + base in marked]
    return result


__all__ = [
    "INDEX_LISTS",
    "LAYER_COUNTS",
    "Shape",
    "config_with_shape",
    "layer_counts",
    "layer_kinds",
    "per_layer_lists",
    "shape_of",
]
