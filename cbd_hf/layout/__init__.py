"""What every axis of every parameter means, and the dimensions a chain varies."""

from cbd_hf.layout.compatibility import check_same_family
from cbd_hf.layout.families import FAMILIES, Axis, Family, TensorSpec, get_family
from cbd_hf.layout.meta import count_parameters, meta_model, parameter_shapes
from cbd_hf.layout.shape import Shape, config_with_shape, shape_of


__all__ = [
    "FAMILIES",
    "Axis",
    "Family",
    "Shape",
    "TensorSpec",
    "check_same_family",
    "config_with_shape",
    "count_parameters",
    "get_family",
    "meta_model",
    "parameter_shapes",
    "shape_of",
]
