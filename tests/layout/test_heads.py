"""Heads with ALiBi carry a position in their index: which one of another count is the same."""

from __future__ import annotations

import math

import pytest

from cbd_hf.layout.heads import SLOPES, matching_heads


@pytest.mark.parametrize("alibi", SLOPES)
def test_slopes_are_those_of_the_paper(alibi: str) -> None:
    """arXiv 2108.12409: for a power of two, a geometric sequence from 2 ** (-8 / heads)."""
    for heads in (1, 2, 4, 8, 16):
        assert SLOPES[alibi](heads) == pytest.approx([2 ** (-8 * (i + 1) / heads) for i in range(heads)], rel=1e-6)


@pytest.mark.parametrize("alibi", SLOPES)
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 32, 71])
def test_every_head_matches_itself(alibi: str, heads: int) -> None:
    assert matching_heads(alibi, heads, heads) == tuple(range(heads))


@pytest.mark.parametrize("alibi", SLOPES)
@pytest.mark.parametrize(("few", "many"), [(1, 2), (2, 4), (4, 8), (4, 16), (8, 16), (8, 32)])
def test_powers_of_two_nest(alibi: str, few: int, many: int) -> None:
    """Every slope of the few is among those of the many; the others are new."""
    grown = matching_heads(alibi, few, many)
    step = many // few
    assert grown == tuple(i // step if (i + 1) % step == 0 else None for i in range(many))
    cut = matching_heads(alibi, many, few)
    assert cut == tuple(step * (i + 1) - 1 for i in range(few))
    assert [grown[head] for head in cut if head is not None] == list(range(few))


@pytest.mark.parametrize("alibi", SLOPES)
@pytest.mark.parametrize(("source", "target"), [(4, 6), (6, 8), (8, 12), (12, 16), (3, 5), (5, 9)])
def test_only_equal_slopes_match(alibi: str, source: int, target: int) -> None:
    have, want = SLOPES[alibi](source), SLOPES[alibi](target)
    matched = matching_heads(alibi, source, target)
    assert len(matched) == target
    for head, slope in zip(matched, want, strict=True):
        if head is None:
            assert not any(math.isclose(slope, other, rel_tol=1e-3) for other in have)
        else:
            assert math.isclose(slope, have[head], rel_tol=1e-5)
    known = [head for head in matched if head is not None]
    assert len(known) == len(set(known))
