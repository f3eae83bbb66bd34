"""One basis for a whole chain: sort a model's coordinates by importance, without changing its function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cbd_hf.layout import Family, Segment, Shape, shape_of
from cbd_hf.transforms.importance import Importance


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Order = Callable[[str, "int | None", int], "torch.Tensor"]
"""(role, layer, count) -> a permutation; roles `"hidden"`, `"kv_heads"`, `"group"`, `"ffn"`, `"ffn:..."`."""


def permuted(tensor: torch.Tensor, name: str, family: Family, shape: Shape, order: Order) -> torch.Tensor:
    """
    One parameter with its channels, heads and units in another order; the same orders everywhere leave the model's
    function unchanged.

    Args:
        tensor (`torch.Tensor`): the parameter.
        name (`str`): its name.
        family (`Family`): the layout.
        shape (`Shape`): the model's dimensions.
        order (`Order`): the new order of each role.
    """
    import torch

    layer, _ = family.split(name)
    for dim, axis in enumerate(family.spec(name).axes):
        if axis.is_fixed:
            continue
        index, offset = [], 0
        for segment in axis.segments:
            index.append(_entries(segment, layer, shape, order) + offset)
            offset += shape.size_of(segment)
        tensor = tensor.index_select(dim, torch.cat(index).to(tensor.device))
    return tensor


def _entries(segment: Segment, layer: int | None, shape: Shape, order: Order) -> torch.Tensor:
    import torch

    role = segment.role
    size = shape.size_of(segment)
    if role == "fixed":
        return torch.arange(size)
    if role not in ("query", "key_value", "group"):
        return torch.arange(size).view(-1, segment.unit)[order(role, layer, shape.count(role))].flatten()
    heads = torch.arange(size).view(shape.kv_heads, -1)[order("kv_heads", layer, shape.kv_heads)]
    if role == "key_value":
        return heads.flatten()
    members = order("group", layer, shape.group)
    if role == "group":  # key and value stay behind the query heads
        members = torch.cat([members, torch.tensor([shape.group, shape.group + 1])])
    return heads.view(shape.kv_heads, -1, segment.unit)[:, members].flatten()


def sort_by_importance(model: PreTrainedModel, family: Family, importance: Importance) -> None:
    """
    Permute, in place, the channels of the residual stream, the key/value heads with their query heads, and the FFN
    units, most important first. The model computes the same function; its subsets are then prefixes, and all anchors
    and targets cut from it share one basis. Heads that carry a position (ALiBi) stay where they are.
    """
    import torch

    shape = shape_of(model.config, family)
    scores = {"ffn": importance.ffn, "kv_heads": [] if family.alibi else importance.kv_heads}

    def order(role: str, layer: int | None, count: int) -> torch.Tensor:
        if role == "hidden":
            return importance.hidden.argsort(descending=True)
        of_layers = scores.get(role)
        if not of_layers or layer is None:
            return torch.arange(count)
        of_layer = of_layers[layer]
        return of_layer.argsort(descending=True) if of_layer is not None else torch.arange(count)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(permuted(parameter, name, family, shape, order))


__all__ = ["Order", "permuted", "sort_by_importance"]
