"""The interface that every way of making a target's weights shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cbd_hf.layout import Family
from cbd_hf.transforms import Trans


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Blueprint:
    """
    Everything an initialiser may use.

    Args:
        config (`PretrainedConfig`): the target's.
        family (`Family`): the chain's layout.
        small (`Trans`): the smaller anchor, brought to the target's shape on request.
        large (`Trans`): the larger anchor, likewise.
        alpha (`float`): weight of the smaller anchor, in [0, 1].
        seed (`int`): for what is drawn at random.
    """

    config: PretrainedConfig
    family: Family
    small: Trans
    large: Trans
    alpha: float
    seed: int


TensorSource = Callable[[str], "torch.Tensor"]
"""Parameter name -> its value (float32, target shape)."""

Initializer = Callable[[Blueprint], TensorSource]


__all__ = ["Blueprint", "Initializer", "TensorSource"]
