"""Which layers of two anchors meet in which layer of a target."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbd_hf.transforms import LayerMap, align_layers, spread
from cbd_hf.transforms.depth import EXPANSION_MAPS, SUBSET_MAPS, align_kinds, match_kinds, without


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


@pytest.mark.parametrize(
    ("name", "have", "want", "sources", "inserted"),
    [
        ("identity", 2, 4, (0, 0, 0, 1), (False, True, True, False)),
        ("identity", 3, 3, (0, 1, 2), (False, False, False)),
        ("identity", 1, 3, (0, 0, 0), (False, True, True)),
        ("interleave", 3, 6, (0, 0, 1, 1, 2, 2), None),
        ("interleave", 2, 5, (0, 0, 0, 1, 1), None),
        ("stack", 3, 6, (0, 1, 2, 0, 1, 2), None),
        ("stack", 2, 5, (0, 1, 0, 1, 0), None),
        ("stride", 5, 3, (0, 2, 4), None),
        ("first", 5, 3, (0, 1, 2), None),
        ("without_middle", 6, 3, (0, 1, 5), None),
        ("without_middle", 6, 4, (0, 1, 4, 5), None),
        ("without_middle", 4, 1, (0,), None),
    ],
)
def test_named_maps(name: str, have: int, want: int, sources: tuple[int, ...], inserted: tuple[bool, ...]) -> None:
    layers = {**EXPANSION_MAPS, **SUBSET_MAPS}[name](have, want)
    assert layers == LayerMap(sources, inserted or (False,) * want)


@pytest.mark.parametrize("name", EXPANSION_MAPS)
@given(have=st.integers(1, 20), more=st.integers(0, 30))
def test_expansions_use_every_layer(name: str, have: int, more: int) -> None:
    layers = EXPANSION_MAPS[name](have, have + more)
    assert len(layers.sources) == len(layers.inserted) == have + more
    assert set(layers.sources) == set(range(have))
    if name == "identity":
        kept = [source for source, new in zip(layers.sources, layers.inserted, strict=True) if not new]
        assert kept == list(range(have))
        if have > 1:
            assert not layers.inserted[0] and not layers.inserted[-1]
    else:
        assert not any(layers.inserted)
        counts = [layers.sources.count(layer) for layer in range(have)]
        assert max(counts) - min(counts) <= 1
    if name != "stack":
        assert list(layers.sources) == sorted(layers.sources)
    else:
        assert all(source == index % have for index, source in enumerate(layers.sources))


@pytest.mark.parametrize("name", SUBSET_MAPS)
@given(want=st.integers(1, 20), more=st.integers(0, 30))
def test_subsets_keep_the_order(name: str, want: int, more: int) -> None:
    layers = SUBSET_MAPS[name](want + more, want)
    assert list(layers.sources) == sorted(set(layers.sources)) and len(layers.sources) == want
    assert layers.sources[0] == 0 and layers.sources[-1] < want + more and not any(layers.inserted)
    if name != "first" and want > 1:
        assert layers.sources[-1] == want + more - 1
    if name == "without_middle":
        gone = sorted(set(range(want + more)) - set(layers.sources))
        assert gone == list(range(gone[0], gone[0] + more)) if gone else True
        assert not gone or abs(gone[0] - (want + more - 1 - gone[-1])) <= 1


@given(data=st.data(), have=st.integers(1, 15))
def test_removal_by_importance(data: st.DataObject, have: int) -> None:
    removed = data.draw(st.permutations(range(have)))[: data.draw(st.integers(0, have - 1))]
    want = have - data.draw(st.integers(0, len(removed)))
    layers = without(removed)(have, want)
    assert set(range(have)) - set(layers.sources) == set(removed[: have - want])
    assert list(layers.sources) == sorted(layers.sources) and len(layers.sources) == want
    if have - len(removed) - 1 >= 1:
        with pytest.raises(ValueError, match=f"only {len(removed)} may be removed"):
            without(removed)(have, have - len(removed) - 1)


KINDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=9)


def cost(few: Sequence[str], many: Sequence[str], found: Sequence[int]) -> float:
    """How far layers lie from their relative depth."""
    scale = (len(many) - 1) / max(1, len(few) - 1)
    return sum(abs(j - i * scale) for i, j in enumerate(found))


@given(many=KINDS, data=st.data())
def test_kinds_are_matched_in_order(many: list[str], data: st.DataObject) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, len(many) - 1), min_size=1)))
    few = [many[index] for index in chosen]
    found = match_kinds(few, many)
    assert [many[index] for index in found] == few
    assert list(found) == sorted(set(found))
    # As near as possible to the same relative depth.
    fitting = [
        places
        for places in itertools.combinations(range(len(many)), len(few))
        if [many[index] for index in places] == few
    ]
    assert cost(few, many, found) == pytest.approx(min(cost(few, many, places) for places in fitting))


@given(few=KINDS, many=KINDS)
def test_kinds_that_do_not_fit(few: list[str], many: list[str]) -> None:
    rest = iter(many)
    if all(kind in rest for kind in few):  # a subsequence
        match_kinds(few, many)
    else:
        with pytest.raises(ValueError, match="do not fit, in order"):
            match_kinds(few, many)


def test_one_kind_is_spread() -> None:
    assert match_kinds("aa", "aaaa") == (0, 3)
    assert match_kinds("aaa", "aaaaa") == spread(3, 5)
    assert match_kinds("ab", "abab") == (0, 3)
    assert match_kinds("aab", "aabaab") == (0, 3, 5)


@given(large=KINDS, data=st.data())
def test_only_layers_of_one_kind_meet(large: list[str], data: st.DataObject) -> None:
    of_target = sorted(data.draw(st.sets(st.integers(0, len(large) - 1), min_size=1)))
    target = [large[index] for index in of_target]
    of_small = sorted(data.draw(st.sets(st.integers(0, len(target) - 1), min_size=1)))
    small = [target[index] for index in of_small]
    if set(target) - set(small):
        with pytest.raises(ValueError, match="shallower anchor has no layer of the kind"):
            align_kinds(small, large, target)
        return
    low, high = align_kinds(small, large, target)
    assert [large[source] for source in high.sources] == target and not any(high.inserted)
    assert [small[source] for source in low.sources] == target
    assert [source for source, new in zip(low.sources, low.inserted, strict=True) if not new] == list(
        range(len(small))
    )
    if len(small) < len(large):
        assert align_kinds(large, small, target) == (high, low)


def test_the_nearest_of_a_kind_says_how_a_gap_is_laid_out() -> None:
    small, large = align_kinds("ab", "abab", "abab")
    assert large.sources == (0, 1, 2, 3)
    assert small == LayerMap((0, 1, 0, 1), (False, True, True, False))
