"""The words of a layout: what an axis of a parameter means, and the dimensions a chain varies."""

from cbd_hf.layout.axes import GROUPS, Axis, Norm, Segment, TensorSpec
from cbd_hf.layout.family import Family, LayoutError
from cbd_hf.layout.meta import count_parameters, meta_model, parameter_shapes, weight_shapes, weights_of
from cbd_hf.layout.shape import Shape, config_with_shape, layer_kinds, per_layer_lists, shape_of


__all__ = [
    "GROUPS",
    "Axis",
    "Family",
    "LayoutError",
    "Norm",
    "Segment",
    "Shape",
    "TensorSpec",
    "config_with_shape",
    "count_parameters",
    "layer_kinds",
    "meta_model",
    "parameter_shapes",
    "per_layer_lists",
    "shape_of",
    "weight_shapes",
    "weights_of",
]
