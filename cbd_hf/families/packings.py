"""
The one table of packings: how several dimensions can share an axis of a tensor.

The sizes of a fused tensor do not say in which order its parts lie. Each entry below is one known order; `infer` tries
those whose sizes fit, and keeps the one under which a small model computes the same function after Trans
(`cbd_hf.families.proof`). A packing that is not here is refused by name. To add one, add an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cbd_hf.layout import Segment


@dataclass(frozen=True)
class Measured:
    """
    How the length of an axis follows the dimensions, as the probes saw it.

    Args:
        per (`Mapping[str, int]`): dimension -> entries per channel, head or unit: `"hidden"`, `"query"`,
            `"key_value"`, `"ffn"`, `"ffn:..."`.
        rest (`int`): entries that follow none of them.
        head_dim (`int`): channels per head.
        grouped (`bool`): key/value heads are counted apart from query heads.
    """

    per: Mapping[str, int]
    rest: int
    head_dim: int
    grouped: bool


Packing = Callable[[Measured], tuple[Segment, ...] | None]


def _plain(axis: Measured) -> tuple[Segment, ...] | None:
    """One dimension, or none; per head any number of consecutive entries (GPT-NeoX's q, k and v of a head)."""
    if not axis.per:
        return (Segment("fixed", 0),)
    if len(axis.per) > 1 or axis.rest:
        return None
    ((role, unit),) = axis.per.items()
    return (Segment(role, unit),) if role in ("query", "key_value") or unit == 1 else None


def _query_key_value(axis: Measured) -> tuple[Segment, ...] | None:
    """Blocks q | k | v: GPT-2's c_attn, Phi-3's qkv_proj, Falcon's multi-query."""
    hd = axis.head_dim
    if axis.per == {"query": 3 * hd} and not axis.grouped and not axis.rest:
        return (Segment("query", hd),) * 3
    if axis.per == {"query": hd, "key_value": 2 * hd} and not axis.rest:
        return (Segment("query", hd), Segment("key_value", hd), Segment("key_value", hd))
    if axis.per == {"query": hd} and axis.rest == 2 * hd:
        return (Segment("query", hd), Segment("fixed", hd), Segment("fixed", hd))
    return None


def _grouped(axis: Measured) -> tuple[Segment, ...] | None:
    """Per key/value head its query heads, its key, its value: Falcon's new decoder, GPT-BigCode's kin."""
    hd = axis.head_dim
    return (Segment("group", hd),) if axis.per == {"query": hd, "key_value": 2 * hd} and not axis.rest else None


def _blocks(axis: Measured) -> tuple[Segment, ...] | None:
    """Equal blocks: gate | up, key | value, two streams side by side."""
    if len(axis.per) != 1 or axis.rest:
        return None
    ((role, unit),) = axis.per.items()
    if role in ("query", "key_value"):
        count = unit // axis.head_dim
        return (Segment(role, axis.head_dim),) * count if count == 2 and unit % axis.head_dim == 0 else None
    return (Segment(role),) * unit if unit > 1 else None


def _interleaved(axis: Measured) -> tuple[Segment, ...] | None:
    """Gate and up of a unit side by side: GPT-OSS."""
    if len(axis.per) != 1 or axis.rest:
        return None
    ((role, unit),) = axis.per.items()
    return (Segment(role, unit),) if role.startswith("ffn") and unit > 1 else None


PACKINGS: dict[str, Packing] = {
    "plain": _plain,
    "query|key|value": _query_key_value,
    "grouped": _grouped,
    "blocks": _blocks,
    "interleaved": _interleaved,
}


def candidates(axis: Measured) -> list[tuple[Segment, ...]]:
    """Every known packing whose sizes fit, each once."""
    found = [packing(axis) for packing in PACKINGS.values()]
    return list(dict.fromkeys(segments for segments in found if segments is not None))


ALIBI: dict[str, str] = {"bloom": "bloom", "falcon": "bloom", "mpt": "mpt"}
"""Model types whose heads may carry slopes (ALiBi) -> the rule for these, a key of `cbd_hf.layout.heads.SLOPES`."""


NEVER_RUN = ("encoder_attn", "crossattention", "cross_attn")
"""Parts of modules' names that a causal LM without an encoder holds and never runs; what they mean is not proved."""


@dataclass(frozen=True)
class Scaling:
    """
    Powers of d/D (hidden sizes before, after) in an expansion.

    Args:
        embedding (`float`): the architecture multiplies embeddings by this power of the hidden size; Gemma's is 0.5.
        stream (`float`): of all that writes the stream. At 0 the stream stays and its variance falls by d/D, which
            the norms' epsilon follows. At -0.5 the stream grows so that its variance stays, and epsilons with it:
            where one epsilon also serves norms of small activations beside the stream (Qwen3-Next), or a norm without
            a gain gives the stream (nanochat). At 0.5 the stream shrinks: a tied head after a norm without a gain.
    """

    embedding: float = 0.0
    stream: float = 0.0


SCALINGS = tuple(Scaling(*powers) for powers in ((0, 0), (0.5, 0), (1, 0), (0, -0.5), (0.5, -0.5), (0, 0.5)))
"""Those that are tried, in order."""

__all__ = ["ALIBI", "NEVER_RUN", "PACKINGS", "SCALINGS", "Measured", "Packing", "Scaling", "candidates"]
