"""Rows are recognised by their tokens and supervised positions."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from cbd_hf.distillation.cache.keys import KeyIndex, iter_rows, keys_of, make_row


TOKENS = [5, 6, 7, 8, 9]


def test_what_is_hashed() -> None:
    key = make_row(TOKENS, [-100, -100, 7, 8, 9]).key()
    assert len(key) == 16
    assert key == make_row(np.array(TOKENS), np.array([5, -100, 7, 8, 9])).key()  # the first is never predicted
    assert key == make_row(TOKENS, [-100, -100, 1, 1, 1]).key()  # which token is learnt does not matter
    others = [
        make_row(TOKENS),
        make_row(TOKENS, [-100, -100, 7, 8, -100]),
        make_row([5, 6, 7, 8, 10], [-100, -100, 7, 8, 9]),
        make_row(TOKENS[:4], [-100, -100, 7, 8]),
        make_row(TOKENS, [-100, -100, 7, 8, 9], [2, 3]),
    ]
    assert len({key, *(other.key() for other in others)}) == 6
    assert make_row(TOKENS).key() == make_row(TOKENS, TOKENS).key() == make_row(TOKENS, TOKENS, [5]).key()


def test_first_tokens_of_packed_sequences_are_not_supervised() -> None:
    row = make_row(TOKENS, TOKENS, [2, 3])
    assert row.supervised.tolist() == [True, False, True, True]
    assert make_row([4]).supervised.tolist() == []


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="5 input_ids and 2 labels"):
        make_row(TOKENS, [1, 2])
    with pytest.raises(ValueError, match="add up to 6"):
        make_row(TOKENS, None, [3, 3])
    with pytest.raises(ValueError, match="no 'input_ids'"):
        list(iter_rows(Dataset.from_list([{"text": "a"}])))


@pytest.mark.parametrize("packed", [False, True])
def test_datasets_and_lists_agree(packed: bool) -> None:
    generator = np.random.default_rng(0)
    rows = []
    for length in generator.integers(1, 30, size=2500):
        tokens = generator.integers(0, 1 << 20, size=length)
        row = {"input_ids": tokens.tolist(), "labels": np.where(tokens % 3 > 0, tokens, -100).tolist()}
        rows.append(row | ({"seq_lengths": [1, int(length) - 1] if length > 1 else [1]} if packed else {}))
    dataset = Dataset.from_list(rows)
    chosen = generator.permutation(2500)[:2100]
    expected = keys_of(rows)
    assert np.array_equal(keys_of(dataset).keys, expected.keys)
    assert expected.longest == max(max(row.get("seq_lengths", [len(row["input_ids"])])) for row in rows)
    for view in (dataset.select(chosen), dataset.with_format("numpy").select(chosen)):
        found = keys_of(view)
        assert np.array_equal(found.keys, expected.keys[chosen])
        assert np.array_equal(found.tokens, expected.tokens[chosen])


def test_transforms_are_respected() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]})
    changed = dataset.with_transform(lambda batch: {"input_ids": [[t + 1 for t in ids] for ids in batch["input_ids"]]})
    assert np.array_equal(keys_of(changed).keys, keys_of([{"input_ids": [2, 3]}, {"input_ids": [4, 5]}]).keys)


def test_index() -> None:
    generator = np.random.default_rng(1)
    # Three values of the first half, so that most keys share theirs.
    words = np.stack([generator.integers(0, 3, 500), generator.integers(0, 200, 500)], axis=1).astype("<u8")
    keys = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 16)
    first: dict[bytes, int] = {}
    for number, key in enumerate(keys):
        first.setdefault(key.tobytes(), number)
    index = KeyIndex(keys)
    wanted = np.concatenate([keys[::-1], np.full((2, 16), 255, np.uint8), np.zeros((1, 16), np.uint8)])
    assert index.find(wanted).tolist() == [first.get(key.tobytes(), -1) for key in wanted]
    assert index.find(keys[:0]).tolist() == []
    assert KeyIndex(keys[:0]).find(keys[:2]).tolist() == [-1, -1]
