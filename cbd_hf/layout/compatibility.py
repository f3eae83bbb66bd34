"""Whether two configs can be neighbours in a chain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cbd_hf.layout.families import Family, get_family
from cbd_hf.layout.shape import shape_of


if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_same_family(first: PretrainedConfig, second: PretrainedConfig) -> Family:
    """
    The common layout of two configs whose weights are to be mixed.

    Raises:
        ValueError: they differ in architecture, vocabulary, head dimension, positions or another attribute that shapes
            the function; names the attribute and both values.
    """
    family = get_family(first)
    if first.model_type != second.model_type:
        raise ValueError(
            f"A chain holds one architecture, got {first.model_type!r} and {second.model_type!r}. Reach another one "
            "by bridge distillation."
        )
    get_family(second)
    a, b = shape_of(first, family), shape_of(second, family)
    for label, one, other in (
        ("vocab_size", a.vocab, b.vocab),
        ("head_dim", a.head_dim, b.head_dim),
        ("the number of positions", a.positions, b.positions),
        *((name, getattr(first, name, None), getattr(second, name, None)) for name in family.must_agree),
    ):
        if one != other:
            raise ValueError(
                f"Two models of one chain must agree in {label}, got {one!r} and {other!r}: their weights cannot be "
                "mixed. Choose anchors that share it."
            )
    return family


__all__ = ["check_same_family"]
