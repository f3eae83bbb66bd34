"""Width: resize single tensors, axis by axis, by what each axis means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cbd_hf.layout import Axis, Family, Shape, TensorSpec


if TYPE_CHECKING:
    import torch

NEW = -1  # in an index: a coordinate that the anchor does not have


def role_index(role: str, source: Shape, target: Shape) -> list[int]:
    """
    For each target coordinate of a role, the source coordinate it takes, or `NEW`: the first ones, heads whole, and
    query heads with their key/value group.
    """
    if role not in ("query", "key_value"):
        available = source.size_of(role)
        return [index if index < available else NEW for index in range(target.size_of(role))]
    source_group, target_group = (source.group, target.group) if role == "query" else (1, 1)
    index = []
    for kv_head in range(target.kv_heads):
        for member in range(target_group):
            exists = kv_head < source.kv_heads and member < source_group
            start = (kv_head * source_group + member) * source.head_dim
            index += [start + channel if exists else NEW for channel in range(target.head_dim)]
    return index


def axis_index(axis: Axis, source: Shape, target: Shape) -> list[int]:
    """[`role_index`] of every role packed along an axis, end to end, in the source tensor's coordinates."""
    index, offset = [], 0
    for role in axis.roles:
        index += [NEW if i == NEW else offset + i for i in role_index(role, source, target)]
        offset += source.size_of(role)
    return index


def resize(
    tensor: torch.Tensor,
    spec: TensorSpec,
    family: Family,
    source: Shape,
    target: Shape,
    fill: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Give one parameter of an anchor the target's width.

    Coordinates that both have are kept (the first ones; heads whole). New coordinates:

    * that a block or embedding writes into the residual stream: zero under RMSNorm. Under LayerNorm the mean of the
      coordinates that exist, which leaves the stream's mean as it was and scales its variance by d/D whatever the
      input, so that the norm correction below is exact (also with a tied head, where centring the weights is not);
    * of a norm's gain: the mean gain, of its shift: zero. Both only meet coordinates that normalise to zero;
    * everywhere else: zero.

    With `fill`, new coordinates whose value cannot change the function take it from there ([`TensorSpec.free`]), so
    that they can learn: a unit whose incoming and outgoing weights are both zero gets no gradient.

    A norm's gain is multiplied by sqrt(d/D), for the statistics that the new coordinates dilute (d, D: hidden size
    before, after); a subset (D < d) is the exact inverse.

    Args:
        tensor (`torch.Tensor`): the anchor's parameter, float32 or float64.
        spec (`TensorSpec`): its meaning.
        family (`Family`): its layout.
        source (`Shape`): the anchor's shape.
        target (`Shape`): the target's shape.
        fill (`torch.Tensor`, *optional*): values for the free new coordinates, in the target's shape.

    Returns:
        `torch.Tensor`: of the same dtype; the tensor itself if its shape does not change.
    """
    import torch

    new_by_dim: dict[int, torch.Tensor] = {}
    for dim, axis in enumerate(spec.axes):
        index = axis_index(axis, source, target)
        if index == list(range(tensor.shape[dim])):
            continue
        positions = torch.tensor(index)
        new = (positions == NEW).nonzero().flatten()
        padding = _padding(tensor, dim, spec, family) if len(new) else None
        tensor = tensor.index_select(dim, positions.clamp(min=0))
        if padding is not None:
            new_by_dim[dim] = new
            tensor.index_copy_(dim, new, padding.expand(*tensor.shape[:dim], len(new), *tensor.shape[dim + 1 :]))
    if spec.norm_gain and source.hidden != target.hidden:
        tensor = tensor * math.sqrt(source.hidden / target.hidden)
    if fill is not None and spec.free:
        for dim, new in new_by_dim.items():
            tensor.index_copy_(dim, new, fill.index_select(dim, new))
    return tensor


def _padding(tensor: torch.Tensor, dim: int, spec: TensorSpec, family: Family) -> torch.Tensor:
    mean_keeps_statistics = spec.writes_stream and family.norm == "layer" and spec.axes[dim].roles == ("hidden",)
    if spec.norm_gain or mean_keeps_statistics:
        return tensor.mean(dim, keepdim=True)
    return tensor.new_zeros(()).expand(*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :])


def resized_eps(eps: float, source: Shape, target: Shape) -> float:
    """The norm's epsilon after [`resize`]: scaled by d/D like the variance it is added to."""
    return eps * source.hidden / target.hidden


__all__ = ["NEW", "axis_index", "resize", "resized_eps", "role_index"]
