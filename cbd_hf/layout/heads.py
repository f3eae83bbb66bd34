"""Heads that carry a position in their index: which head of another count has the same attention-bias slope."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache


def _bloom(heads: int) -> list[float]:
    import torch
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    # At position 1 the bias is the slope itself.
    bias = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    return [float(value) for value in bias.view(heads, 2)[:, 1]]


def _mpt(heads: int) -> list[float]:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    return [-float(value) for value in build_mpt_alibi_tensor(heads, 2).view(heads, 2)[:, 0]]


SLOPES: dict[str, Callable[[int], list[float]]] = {"bloom": _bloom, "mpt": _mpt}
"""ALiBi (arXiv 2108.12409): number of heads -> the slope of each, by the library's own functions."""


@lru_cache
def matching_heads(alibi: str, source: int, target: int) -> tuple[int | None, ...]:
    """For each of `target` heads, the head among `source` with the same slope, or `None`."""
    slopes = SLOPES[alibi](source)
    return tuple(
        # Neighbouring slopes differ by a factor of 2 ** (8 / heads) or its root; float32 rounding by 1e-6.
        next((head for head, known in enumerate(slopes) if math.isclose(known, slope, rel_tol=1e-3)), None)
        for slope in SLOPES[alibi](target)
    )


__all__ = ["SLOPES", "matching_heads"]
