"""The dimensions of a causal LM that a chain varies, read from and written to its Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cbd_hf.layout.families import Family


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
        ffn (`int`): units of one feed-forward network.
        vocab (`int`): rows of the embedding, padding included.
        positions (`int`): learned position embeddings; 0 where the family has none.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int = 0

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

    def size_of(self, role: str) -> int:
        """Number of coordinates of an axis role; see [`cbd_hf.layout.families.ROLES`]."""
        return {
            "hidden": self.hidden,
            "query": self.heads * self.head_dim,
            "key_value": self.kv_heads * self.head_dim,
            "head_dim": self.head_dim,
            "ffn": self.ffn,
            "vocab": self.vocab,
            "positions": self.positions,
        }[role]


def shape_of(config: PretrainedConfig, family: Family) -> Shape:
    """The [`Shape`] that `config` describes."""
    fields = family.fields
    heads = getattr(config, fields["heads"])
    hidden = getattr(config, fields["hidden"])
    kv_heads = getattr(config, fields["kv_heads"], None) if "kv_heads" in fields else None
    head_dim = getattr(config, "head_dim", None)
    return Shape(
        layers=getattr(config, fields["layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or hidden // heads,
        ffn=getattr(config, fields["ffn"]) or 4 * hidden,  # GPT-2 writes None for 4 x hidden
        vocab=config.vocab_size,
        positions=getattr(config, fields["positions"]) if "positions" in fields else 0,
    )


def config_with_shape(config: PretrainedConfig, shape: Shape, family: Family) -> PretrainedConfig:
    """
    A copy of `config` with the dimensions of `shape`.

    Raises:
        ValueError: the family ties heads x head_dim to the hidden size and `shape` breaks that, or its layers have
            mixed types (sliding and full attention), which cannot be re-laid yet.
    """
    fields = family.fields
    if family.heads_fill_hidden and shape.heads * shape.head_dim != shape.hidden:
        raise ValueError(
            f"{config.model_type} needs hidden size = heads x head_dim, got {shape.hidden} and {shape.heads} x "
            f"{shape.head_dim}: change one of them."
        )
    values: dict[str, Any] = config.to_dict()
    layer_types = values.pop("layer_types", None)
    if layer_types is not None:
        if len(set(layer_types)) > 1:
            raise ValueError(
                f"This {config.model_type} mixes layer types {sorted(set(layer_types))}; only uniform layers are "
                "supported."
            )
        values["layer_types"] = layer_types[:1] * shape.layers
    values[fields["layers"]] = shape.layers
    values[fields["hidden"]] = shape.hidden
    values[fields["heads"]] = shape.heads
    values[fields["ffn"]] = shape.ffn
    if values.get("n_inner", 0) == 4 * shape.hidden:
        values["n_inner"] = None  # as the family's own checkpoints write it
    if "kv_heads" in fields:
        values[fields["kv_heads"]] = shape.kv_heads
    if values.get("head_dim") is not None or shape.hidden // shape.heads != shape.head_dim:
        values["head_dim"] = shape.head_dim
    if "n_ctx" in values and "positions" in fields:
        values["n_ctx"] = shape.positions
    for key in ("_name_or_path", "architectures", "transformers_version"):
        values.pop(key, None)
    return type(config).from_dict(values)


__all__ = ["Shape", "config_with_shape", "shape_of"]
