"""Which layers of two anchors meet in which layer of a target."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbd_hf.transforms import LayerMap, align_layers, spread


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(1, 5, (0,)), (2, 5, (0, 4)), (3, 5, (0, 2, 4)), (5, 5, (0, 1, 2, 3, 4)), (1, 1, (0,)), (3, 6, (0, 2, 5))],
)
def test_spread(count: int, total: int, expected: tuple[int, ...]) -> None:
    assert spread(count, total) == expected


@given(st.integers(1, 60), st.integers(0, 60))
def test_spread_is_even(count: int, more: int) -> None:
    total = count + more
    chosen = spread(count, total)
    assert len(set(chosen)) == count and list(chosen) == sorted(chosen)
    if count > 1:
        assert (chosen[0], chosen[-1]) == (0, total - 1)
        gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("count", "total"), [(0, 3), (4, 3), (-1, 3)])
def test_spread_refuses(count: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"Cannot choose {count} of {total}"):
        spread(count, total)


def test_equal_depths() -> None:
    same = LayerMap((0, 1, 2), (False,) * 3)
    assert align_layers(3, 3, 3) == (same, same)


def test_gaps_of_the_shallower_anchor() -> None:
    small, large = align_layers(2, 5, 4)
    assert large == LayerMap((0, 1, 3, 4), (False,) * 4)
    assert small == LayerMap((0, 0, 0, 1), (False, True, True, False))


def test_ends_take_the_anchors_as_they_are() -> None:
    small, large = align_layers(2, 5, 2)
    assert small == LayerMap((0, 1), (False, False))
    assert large.sources == (0, 4)
    small, large = align_layers(2, 5, 5)
    assert large == LayerMap(tuple(range(5)), (False,) * 5)
    assert small.inserted == (False, True, True, True, False)


@pytest.mark.parametrize(("target", "sources"), [(2, (0, 4)), (3, (0, 2, 4)), (4, (0, 1, 2, 4)), (5, (0, 1, 2, 3, 4))])
def test_recorded_cut(target: int, sources: tuple[int, ...]) -> None:
    """What was removed last, the most important of the removed, comes back first."""
    small, large = align_layers(2, 5, target, kept=[0, 4], order=[3, 1, 2])
    assert large.sources == sources
    assert small.inserted == tuple(layer not in (0, 4) for layer in sources)


def test_gap_before_the_first_kept_layer() -> None:
    small, large = align_layers(1, 3, 3, kept=[2])
    assert large.sources == (0, 1, 2)
    assert small == LayerMap((0, 0, 0), (True, True, False))


@given(data=st.data(), n_large=st.integers(1, 12))
def test_alignment(data: st.DataObject, n_large: int) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, n_large - 1), min_size=1)))
    target = data.draw(st.integers(len(kept), n_large))
    others = data.draw(st.permutations([layer for layer in range(n_large) if layer not in kept]))
    order = data.draw(st.sampled_from([None, list(others)]))
    small, large = align_layers(len(kept), n_large, target, kept, order)
    assert list(large.sources) == sorted(set(large.sources)) and len(large.sources) == target
    assert not any(large.inserted)
    for layer, source, inserted in zip(large.sources, small.sources, small.inserted, strict=True):
        assert inserted == (layer not in kept)
        assert inserted or kept[source] == layer
    assert [source for source, new in zip(small.sources, small.inserted, strict=True) if not new] == list(
        range(len(kept))
    )
    if order is not None:
        extra = set(large.sources) - set(kept)
        assert extra == set(order[len(order) - len(extra) :])
    # A smaller anchor that is the deeper one: the same two maps, with their roles exchanged.
    assert align_layers(n_large, len(kept), target, kept, order) == (large, small)


@pytest.mark.parametrize("sizes", [(2, 5), (5, 2)])
@pytest.mark.parametrize("target", [1, 6])
def test_target_outside(sizes: tuple[int, int], target: int) -> None:
    with pytest.raises(ValueError, match=f"target's {target} layers must lie between the anchors' 2 and 5"):
        align_layers(*sizes, target)


@pytest.mark.parametrize("kept", [[0], [0, 5], [-1, 3], [3, 1], [2, 2], [0, 1, 2]])
def test_kept_that_does_not_fit(kept: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="do not map 2 layers into 5"):
        align_layers(2, 5, 3, kept)


@pytest.mark.parametrize("order", [[], [1, 2], [1, 2, 4], [1, 1, 2], [0, 1, 2, 3]])
def test_order_that_does_not_fit(order: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"must list the layers that were not kept, \[1, 2, 3\]"):
        align_layers(2, 5, 3, [0, 4], order)
