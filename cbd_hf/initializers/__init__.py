"""Every way to make a target's weights, by name and behind one interface."""

from cbd_hf.initializers.assemble import assemble
from cbd_hf.initializers.base import Blueprint, Initializer, TensorSource
from cbd_hf.initializers.chain import interpolate
from cbd_hf.initializers.single import cut, expand


INITIALIZERS: dict[str, Initializer] = {"chain": interpolate, "cut": cut, "expand": expand}
"""Initialisers made from anchors. `"random"`, the architecture's own, is the one name beside them."""

RANDOM = "random"

__all__ = [
    "INITIALIZERS",
    "RANDOM",
    "Blueprint",
    "Initializer",
    "TensorSource",
    "assemble",
    "cut",
    "expand",
    "interpolate",
]
