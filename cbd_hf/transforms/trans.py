"""Trans: one anchor brought to the target's shape, tensor by tensor (paper Eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cbd_hf.checkpoint import CheckpointReader
from cbd_hf.layout import Family, Shape
from cbd_hf.transforms.depth import LayerMap
from cbd_hf.transforms.width import resize


if TYPE_CHECKING:
    import torch

Expansion = Literal["identity", "replicate"]
EXPANSIONS: tuple[Expansion, ...] = ("identity", "replicate")


@dataclass(frozen=True)
class Trans:
    """
    Structural transformation of one anchor to the target's shape, read lazily.

    Args:
        reader (`CheckpointReader`): the anchor's weights.
        family (`Family`): its layout.
        source (`Shape`): the anchor's shape.
        target (`Shape`): the target's shape.
        layers (`LayerMap`): where each target layer comes from.
        expansion (`"identity"` or `"replicate"`, *optional*, defaults to `"identity"`): what stands where the anchor
            has no layer: its neighbour with zeroed output projections, which leaves the function unchanged, or a
            plain copy of the neighbour, which does not.
    """

    reader: CheckpointReader
    family: Family
    source: Shape
    target: Shape
    layers: LayerMap
    expansion: Expansion = "identity"

    def inserted(self, name: str) -> bool:
        """Whether target parameter `name` lies in a layer that this anchor does not have."""
        layer, _ = self.family.split(name)
        return layer is not None and self.layers.inserted[layer]

    def tensor(self, name: str, fill: torch.Tensor | None = None) -> torch.Tensor:
        """
        The anchor's contribution to target parameter `name`: float32, in the target's shape. Not to be changed in
        place: it may be `fill` itself or share the memory that the next read of the same tensor returns.

        Args:
            name (`str`): the target's parameter.
            fill (`torch.Tensor`, *optional*): values in the target's shape for the coordinates, or whole inserted
                layers, that the anchor lacks and that cannot change its function; see [`resize`].

        Raises:
            CheckpointError: the anchor lacks the tensor.
            ValueError: its stored shape does not fit the anchor's config.
        """
        import torch

        layer, local = self.family.split(name)
        spec = self.family.spec(name)
        identity_block = self.expansion == "identity" and self.inserted(name)
        if identity_block and fill is not None and not spec.block_output:
            return fill
        source_name = name if layer is None else self.family.join(self.layers.sources[layer], local)
        tensor = self.reader.read(source_name).to(torch.float32)
        expected = tuple(sum(self.source.size_of(role) for role in axis.roles) for axis in spec.axes)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{source_name} in {self.reader.directory} has shape {tuple(tensor.shape)}, but its config says "
                f"{expected}."
            )
        tensor = resize(tensor, spec, self.family, self.source, self.target, fill)
        return torch.zeros_like(tensor) if identity_block and spec.block_output else tensor


__all__ = ["EXPANSIONS", "Expansion", "Trans"]
