"""Which parts a subset keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbd_hf.transforms import SELECTIONS, First, MostImportant, Selection, Stride
from cbd_hf.transforms.importance import Importance


def importance(hidden: list[float], kv_heads: list[list[float]], ffn: list[list[float]]) -> MostImportant:
    rows = [[torch.tensor(row) for row in rows] for rows in (kv_heads, ffn)]
    return MostImportant(Importance(torch.tensor(hidden), rows[0], rows[1], torch.zeros(1)))


@pytest.mark.parametrize(
    "rule", [First(), Stride(), importance(list(range(40)), [], [])], ids=["first", "stride", "i"]
)
@given(have=st.integers(1, 40), data=st.data())
def test_parts_are_kept_once_and_in_order(rule: Selection, have: int, data: st.DataObject) -> None:
    want = data.draw(st.integers(1, have))
    if isinstance(rule, MostImportant):
        rule = importance(data.draw(st.permutations(range(have))), [], [])
    kept = list(rule.keep("hidden", None, have, want))
    assert len(kept) == want and kept == sorted(set(kept)) and 0 <= kept[0] and kept[-1] < have
    if want == have:
        assert kept == list(range(have))


@given(have=st.integers(1, 60), want=st.integers(1, 60), fewer=st.integers(1, 60))
def test_prefixes_nest(have: int, want: int, fewer: int) -> None:
    fewer, want, have = sorted((fewer, want, have))
    rule = First()
    via = [rule.keep("ffn", 0, have, want)[index] for index in rule.keep("ffn", 0, want, fewer)]
    assert via == list(rule.keep("ffn", 0, have, fewer)) == list(range(fewer))


@given(want=st.integers(1, 20), factor=st.integers(1, 5), more=st.integers(0, 19))
def test_strides_are_even(want: int, factor: int, more: int) -> None:
    assert list(Stride().keep("ffn", 0, want * factor, want)) == list(range(0, want * factor, factor))
    have = want * factor + more % want
    kept = list(Stride().keep("ffn", 0, have, want))
    gaps = [b - a for a, b in zip(kept, kept[1:], strict=False)]
    assert kept[0] == 0 and (not gaps or max(gaps) - min(gaps) <= 1)


def test_the_most_important_by_role_and_layer() -> None:
    rule = importance([3, 1, 2, 9], [[1, 5, 2], [7, 0, 1]], [[0, 1, 2, 3], [3, 2, 1, 0]])
    assert list(rule.keep("hidden", None, 4, 2)) == [0, 3]
    assert list(rule.keep("hidden", 1, 4, 2)) == [0, 3]  # one stream for all layers
    assert list(rule.keep("kv_heads", 0, 3, 1)) == [1] and list(rule.keep("kv_heads", 1, 3, 2)) == [0, 2]
    assert list(rule.keep("ffn", 0, 4, 2)) == [2, 3] and list(rule.keep("ffn", 1, 4, 2)) == [0, 1]
    # Nothing was measured for these.
    assert list(rule.keep("group", 0, 3, 2)) == [0, 1]
    assert list(rule.keep("ffn:moe_intermediate_size", 0, 3, 2)) == [0, 1]


def test_importance_of_another_model() -> None:
    with pytest.raises(ValueError, match="importance of hidden was measured for 4 parts, but there are 5"):
        importance([1, 2, 3, 4], [], []).keep("hidden", None, 5, 2)


def test_what_rules_say_of_themselves() -> None:
    assert set(SELECTIONS) >= {"first", "stride", "importance"}
    for rule in (First(), Stride(), importance([1.0], [], [])):
        assert rule.raw is False
        assert rule.by_layer is isinstance(rule, MostImportant)
