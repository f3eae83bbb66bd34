"""Which prompts are sampled together, and which samples each optimizer step trains on."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler


class RolloutSchedule(Sampler[int]):
    """
    Splits each epoch's shuffled prompts into rollout batches, and each of these, `inner_epochs` times in new orders,
    into optimizer steps. Everything follows from the seed and the number of a step, so that a resumed run goes on
    alike. Prompts that do not fill a rollout batch are left to a later epoch, which shuffles anew.

    Args:
        rows (`int`): prompts of the dataset.
        rollout_batch_size (`int`): a multiple of `step_size`.
        step_size (`int`): rows of one optimizer step, on all processes.
        inner_epochs (`int`): times that each sample is trained on.
        seed (`int`): of all shuffling.
        shuffle (`bool`, *optional*, defaults to `True`): else prompts are taken in order.

    Raises:
        ValueError: `rollout_batch_size` is larger than `rows` or no multiple of `step_size`.
    """

    def __init__(
        self, rows: int, rollout_batch_size: int, step_size: int, inner_epochs: int, seed: int, shuffle: bool = True
    ) -> None:
        if rollout_batch_size % step_size:
            raise ValueError(
                f"rollout_batch_size={rollout_batch_size} must be a multiple of the {step_size} rows of an optimizer "
                "step (per_device_train_batch_size x gradient_accumulation_steps x processes)."
            )
        if rollout_batch_size > rows:
            raise ValueError(
                f"rollout_batch_size={rollout_batch_size} needs as many prompts, but the dataset has {rows}: lower it."
            )
        self.rows = rows
        self.rollout_batch_size = rollout_batch_size
        self.step_size = step_size
        self.inner_epochs = inner_epochs
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.steps_per_rollout = inner_epochs * rollout_batch_size // step_size
        self.rollouts_per_epoch = rows // rollout_batch_size

    def __len__(self) -> int:
        return self.rollouts_per_epoch * self.rollout_batch_size * self.inner_epochs

    def __iter__(self) -> Iterator[int]:
        steps = self.rollouts_per_epoch * self.steps_per_rollout
        for step in range(self.epoch * steps, (self.epoch + 1) * steps):
            yield from self.step_rows(step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated over."""
        self.epoch = epoch

    def rollout_rows(self, rollout: int) -> list[int]:
        """The dataset's rows of a rollout batch, which are counted over epochs."""
        epoch, index = divmod(rollout, self.rollouts_per_epoch)
        order = _order(self.rows, f"{self.seed} {epoch}") if self.shuffle else list(range(self.rows))
        return order[index * self.rollout_batch_size : (index + 1) * self.rollout_batch_size]

    def step_rows(self, step: int) -> list[int]:
        """The rows of an optimizer step, the first being 0."""
        rollout, part = divmod(step, self.steps_per_rollout)
        inner, index = divmod(part, self.rollout_batch_size // self.step_size)
        rows = self.rollout_rows(rollout)
        order = _order(len(rows), f"{self.seed} {rollout} {inner}")
        return [rows[position] for position in order[index * self.step_size : (index + 1) * self.step_size]]


def cycled_rows(rows: int, start: int, count: int, seed: int) -> list[int]:
    """`count` rows from position `start` of an endless list of shuffled epochs of `rows` rows."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(start, start + count):
        epoch, index = divmod(position, rows)
        if epoch not in orders:
            orders[epoch] = _order(rows, f"text {seed} {epoch}")
        chosen.append(orders[epoch][index])
    return chosen


def _order(rows: int, seed: str) -> list[int]:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return order


__all__ = ["RolloutSchedule", "cycled_rows"]
