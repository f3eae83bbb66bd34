"""The layout of one architecture: for every parameter, what its axes mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cbd_hf.layout.axes import Group, TensorSpec


class LayoutError(ValueError):
    """An architecture whose weights this package cannot resize, with the reason."""


@dataclass(frozen=True)
class Family:
    """
    Layout of one architecture, as `cbd_hf.families.get_family` learns it.

    Args:
        model_type (`str`): `config.model_type`.
        layer_prefix (`str`): the name of the layer list, with a trailing dot.
        tensors (`Mapping[str, TensorSpec]`): specs of the parameters outside the layers by full name, and of those in
            a layer by the name after `<layer_prefix><index>.`.
        norm (`"rms"` or `"layer"`): the norm of the residual stream.
        fields (`Mapping[str, str]`): dimension -> config attribute.
        eps_fields (`tuple[str, ...]`): config attributes of the stream's norms' epsilon; empty if hard-coded.
        heads_fill_hidden (`bool`): the architecture requires heads x head_dim = hidden.
        ffn_per_hidden (`int`, *optional*): FFN units per channel where the architecture fixes that ratio.
        follows_hidden (`tuple[str, ...]`): further config attributes that must equal the hidden size.
        alibi (`str`, *optional*): how the slopes of attention biases follow from the number of heads; a key of
            `cbd_hf.layout.heads.SLOPES`.
        inert (`tuple[str, ...]`): config attributes that look like dimensions and move no parameter.
        uniform (`bool`): every layer has the same parameters.
    """

    model_type: str
    layer_prefix: str
    tensors: Mapping[str, TensorSpec]
    norm: Literal["rms", "layer"]
    fields: Mapping[str, str]
    eps_fields: tuple[str, ...] = ()
    heads_fill_hidden: bool = False
    ffn_per_hidden: int | None = None
    follows_hidden: tuple[str, ...] = ()
    alibi: str | None = None
    inert: tuple[str, ...] = ()
    uniform: bool = True

    def spec(self, name: str) -> TensorSpec:
        """Spec of parameter `name`. Raises `LayoutError` for a parameter this family does not have."""
        _, local = self.split(name)
        try:
            return self.tensors[local]
        except KeyError:
            raise LayoutError(
                f"Parameter {name} is not in the layout of {self.model_type}, which has "
                f"{len(self.tensors)} kinds of parameters; the config changes the structure."
            ) from None

    def split(self, name: str) -> tuple[int | None, str]:
        """(layer index or `None`, name within the layer) of a parameter."""
        if not name.startswith(self.layer_prefix):
            return None, name
        index, _, local = name.removeprefix(self.layer_prefix).partition(".")
        return int(index), local

    def join(self, layer: int | None, local: str) -> str:
        """Inverse of [`Family.split`]."""
        return local if layer is None else f"{self.layer_prefix}{layer}.{local}"

    def group(self, name: str) -> Group:
        """The kind of part that parameter `name` belongs to."""
        return self.spec(name).group


__all__ = ["Family", "LayoutError"]
