"""The interface that every way of making a target's weights shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cbd_hf.layout import Family
from cbd_hf.transforms import Trans, resized_eps


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from cbd_hf.transforms.importance import Importance

Rows = tuple[int, int]
"""First row of a parameter and the one after the last."""


@dataclass(frozen=True)
class Blueprint:
    """
    Everything an initialiser may use.

    Args:
        config (`PretrainedConfig`): the target's.
        family (`Family`): the chain's layout.
        small (`Trans`): the smaller anchor, brought to the target's shape on request.
        large (`Trans`): the larger anchor, likewise.
        alpha (`Mapping[str, float]`): weight of the smaller anchor, in [0, 1], by `cbd_hf.layout.GROUPS`.
        seed (`int`): for what is drawn at random.
        importance (`Callable[[], Importance]`, *optional*): measures the larger anchor on the caller's calibration
            text; absent without such text.
    """

    config: PretrainedConfig
    family: Family
    small: Trans
    large: Trans
    alpha: Mapping[str, float]
    seed: int
    importance: Callable[[], Importance] | None = None

    def generator(self, name: str) -> torch.Generator:
        """A random stream for parameter `name` alone, so that no value depends on the order of the others."""
        import zlib

        import torch

        # One hash of both, since generators look at the low 32 bits of a seed only.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))

    def target_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the target's parameter `name`."""
        return self.small.target_shape(name)


@dataclass(frozen=True)
class TensorSource:
    """
    How a target's parameters are made.

    Args:
        make (`Callable[[str, Rows | None], torch.Tensor]`): the value of a parameter, or of some of its rows, in the
            target's shape; float32, or the stored dtype of what is no floating-point number. Not to be changed in
            place.
        splits (`Callable[[str], bool]`): whether `make` can give some rows of a parameter without making all of it.
        trans (`tuple[Trans, ...]`): what it reads, to be checked before anything is written.
        shares (`tuple[float, ...]`, *optional*): the weight of each of `trans` in the norms' gains, and so in their
            epsilon; by default equal.
        in_place (`bool`): `make` takes a third argument, memory to make the value in if it can.
    """

    make: Callable[..., torch.Tensor]
    splits: Callable[[str], bool]
    trans: tuple[Trans, ...]
    shares: tuple[float, ...] = ()
    in_place: bool = False

    def eps(self, values: Mapping[int, float]) -> float:
        """
        The target's epsilon from those of the anchors.

        Args:
            values (`Mapping[int, float]`): position in `trans` -> the anchor's epsilon.
        """
        if len({(values[index], trans.source.hidden) for index, trans in enumerate(self.trans)}) == 1:
            trans = self.trans[0]  # to the bit, whatever the shares
            return resized_eps(values[0], trans.source, trans.target) if trans.growth == "pad" else values[0]
        shares = self.shares or (1 / len(self.trans),) * len(self.trans)
        total = 0.0
        for index, (trans, share) in enumerate(zip(self.trans, shares, strict=True)):
            scaled = resized_eps(values[index], trans.source, trans.target) if trans.growth == "pad" else values[index]
            total += share * scaled
        return total


Initializer = Callable[[Blueprint], TensorSource]


__all__ = ["Blueprint", "Initializer", "Rows", "TensorSource"]
