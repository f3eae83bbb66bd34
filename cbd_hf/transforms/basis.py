"""One basis for a whole chain: sort a model's coordinates by importance, without changing its function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cbd_hf.layout import get_family, shape_of
from cbd_hf.transforms.importance import Importance


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def sort_by_importance(model: PreTrainedModel, importance: Importance) -> None:
    """
    Permute, in place, the channels of the residual stream, the key/value heads with their query heads, and the FFN
    units, most important first. The model computes the same function; its subsets are then prefixes, and all anchors
    and targets cut from it share one basis (DESIGN: "One basis").
    """
    import torch

    family = get_family(model.config)
    shape = shape_of(model.config, family)
    hidden = importance.hidden.argsort(descending=True)

    def order(role: str, layer: int | None) -> torch.Tensor:
        if role == "hidden":
            return hidden
        if role == "ffn" and layer is not None:
            return importance.ffn[layer].argsort(descending=True)
        size = shape.size_of(role)
        if role in ("query", "key_value") and layer is not None:
            heads = importance.kv_heads[layer].argsort(descending=True)
            return torch.arange(size).view(shape.kv_heads, -1)[heads].flatten()
        return torch.arange(size)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer, _ = family.split(name)
            for dim, axis in enumerate(family.spec(name).axes):
                index, offset = [], 0
                for role in axis.roles:
                    index.append(order(role, layer) + offset)
                    offset += shape.size_of(role)
                parameter.copy_(parameter.index_select(dim, torch.cat(index).to(parameter.device)))


__all__ = ["sort_by_importance"]
