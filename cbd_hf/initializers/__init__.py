"""Every way to make a target's weights, by name and behind one interface."""

from cbd_hf.initializers.assemble import assemble, fill_model, made, row_blocks
from cbd_hf.initializers.base import Blueprint, Initializer, Rows, TensorSource
from cbd_hf.initializers.chain import interpolate
from cbd_hf.initializers.hypercloning import hypercloning
from cbd_hf.initializers.learngene import auto_learngene, vanilla_learngene
from cbd_hf.initializers.single import cut, expand
from cbd_hf.initializers.stacking import interleave, stack, stride
from cbd_hf.initializers.subcloning import importance, weight_subcloning
from cbd_hf.initializers.weight_selection import weight_selection


INITIALIZERS: dict[str, Initializer] = {
    "chain": interpolate,
    "cut": cut,
    "expand": expand,
    "auto_learngene": auto_learngene,
    "hypercloning": hypercloning,
    "importance": importance,
    "interleave": interleave,
    "stack": stack,
    "stride": stride,
    "vanilla_learngene": vanilla_learngene,
    "weight_selection": weight_selection,
    "weight_subcloning": weight_subcloning,
}
"""Initialisers made from anchors; docs/initializers.md compares them. `"random"` is the one name beside them."""

RANDOM = "random"

__all__ = [
    "INITIALIZERS",
    "RANDOM",
    "Blueprint",
    "Initializer",
    "Rows",
    "TensorSource",
    "assemble",
    "auto_learngene",
    "cut",
    "expand",
    "fill_model",
    "hypercloning",
    "importance",
    "interleave",
    "interpolate",
    "made",
    "row_blocks",
    "stack",
    "stride",
    "vanilla_learngene",
    "weight_selection",
    "weight_subcloning",
]
