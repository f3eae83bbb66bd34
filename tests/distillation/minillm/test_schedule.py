"""Every prompt of a rollout batch is trained on `inner_epochs` times before the next batch is drawn."""

from __future__ import annotations

from collections import Counter

import pytest

from cbd_hf.distillation.minillm.schedule import RolloutSchedule, cycled_rows


@pytest.mark.parametrize("shuffle", [True, False])
def test_blocks(shuffle: bool) -> None:
    schedule = RolloutSchedule(rows=22, rollout_batch_size=8, step_size=4, inner_epochs=3, seed=1, shuffle=shuffle)
    assert schedule.steps_per_rollout == 6
    seen: list[int] = []
    for rollout in range(5):
        rows = schedule.rollout_rows(rollout)
        assert len(set(rows)) == 8
        counts: Counter[int] = Counter()
        for step in range(6 * rollout, 6 * rollout + 6):
            assert len(set(schedule.step_rows(step))) == 4
            counts.update(schedule.step_rows(step))
        assert counts == dict.fromkeys(rows, 3)
        seen += rows
    assert (seen[:16] == list(range(16))) is not shuffle
    assert len(set(seen[:16])) == 16  # an epoch has 2 batches; the third begins another
    assert (seen[16:32] == seen[:16]) is not shuffle


def test_as_a_sampler() -> None:
    schedule = RolloutSchedule(rows=10, rollout_batch_size=4, step_size=2, inner_epochs=2, seed=1)
    for epoch in (0, 1):
        schedule.set_epoch(epoch)
        expected = [row for step in range(8 * epoch, 8 * epoch + 8) for row in schedule.step_rows(step)]
        assert list(schedule) == expected and len(schedule) == len(expected)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rollout_batch_size=10 must be a multiple of the 4 rows"):
        RolloutSchedule(20, 10, 4, 1, 0)
    with pytest.raises(ValueError, match="rollout_batch_size=32 needs as many prompts, but the dataset has 20"):
        RolloutSchedule(20, 32, 4, 1, 0)


def test_cycled_rows() -> None:
    rows = cycled_rows(5, 0, 15, seed=3)
    assert all(sorted(rows[start : start + 5]) == [0, 1, 2, 3, 4] for start in (0, 5, 10))
    assert cycled_rows(5, 4, 6, seed=3) == rows[4:10]
    assert rows[:5] != rows[5:10] or rows[:5] != rows[10:]
