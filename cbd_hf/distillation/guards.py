"""Stop a training whose loss, gradient or weights went bad, and say where and what to do."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cbd_hf.distillation.checkpoints import last_complete_checkpoint, last_written_checkpoint


_LISTED = 32
_HISTORY = "cbd_losses.json"


class LossError(RuntimeError):
    """A loss, gradient or weight that is not finite, or a loss that exploded."""


class LossGuard:
    """
    Looks at every step's loss before the step is taken.

    A loss explodes if it is larger than `factor` times the median of the last accepted ones, and larger than `floor`.
    Neither a single outlier nor losses close to zero move that limit much, and none is set before `warm_up` losses.
    It depends on nothing but the losses, so that all processes that are given the same ones raise together.

    Args:
        factor (`float`, *optional*, defaults to 100.0): above 1; `None` or 0 looks for non-finite losses only.
        output_dir (`str` or `Path`, *optional*): where the trainer's checkpoints are, to name the last good one.
        window (`int`, *optional*, defaults to 50): how many accepted losses the median is of.
        warm_up (`int`, *optional*, defaults to 10): how many must have been accepted before one can explode.
        floor (`float`, *optional*, defaults to 1.0): a loss up to this, in nats per token, never counts as exploded.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        factor: float | None = 100.0,
        output_dir: str | Path | None = None,
        *,
        window: int = 50,
        warm_up: int = 10,
        floor: float = 1.0,
    ) -> None:
        if factor and not factor > 1:
            raise ValueError(f"factor={factor} must be above 1 (100: a hundred times the median), or 0 for no limit.")
        if not 1 <= warm_up <= window:
            raise ValueError(f"warm_up={warm_up} must be in [1, window], and window is {window}.")
        self.factor = factor
        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.warm_up = warm_up
        self.floor = floor
        self._losses: deque[float] = deque(maxlen=window)
        self._step = 0
        self._example_ids: Sequence[int] | Callable[[], Sequence[int]] = ()

    @property
    def limit(self) -> float | None:
        """The largest loss that is accepted now; `None` if every finite one is."""
        if not self.factor or len(self._losses) < self.warm_up:
            return None
        return max(self.factor * median(self._losses), self.floor)

    def check(self, loss: float, step: int, example_ids: Sequence[int] | Callable[[], Sequence[int]]) -> None:
        """
        Accept the loss of a step, or raise. Call it before the optimizer's step.

        Args:
            loss (`float`): of the global batch, the same on every process.
            step (`int`): the number of the step that is about to be taken, the first being 1.
            example_ids (`Sequence[int]` or `Callable`): the rows of the global batch, or what returns them. That is
                called only to name them in an error, here or in [`check_gradient`]; as all processes see the same
                loss, it may gather them from all.

        Raises:
            LossError: the loss is not finite, or exploded.
        """
        loss = float(loss)
        self._step, self._example_ids = step, example_ids
        if not math.isfinite(loss):
            raise self._error(f"the loss is {loss}")
        limit = self.limit
        if limit is not None and loss > limit:
            raise self._error(
                f"the loss is {loss:.4g}, more than the limit of {limit:.4g} ({self.factor:g} times the median of the "
                f"last {len(self._losses)} steps, {median(self._losses):.4g}, but at least {self.floor:g})"
            )
        self._losses.append(loss)

    def check_gradient(self, norm: Any) -> None:
        """
        Raise for a gradient that is not finite, after [`check`] of the same step.

        Not for fp16, where the loss scaler itself skips the steps whose gradient overflows.

        Args:
            norm (`float` or `torch.Tensor`): norm of the whole gradient, before it is clipped.

        Raises:
            LossError: it is not finite.
        """
        norm = float(norm)
        if not math.isfinite(norm):
            self._losses.pop()
            raise self._error(f"the norm of the gradient is {norm}")

    def save(self, checkpoint: str | Path) -> None:
        """Put the last losses into a checkpoint, without which the first steps after it would go unwatched."""
        (Path(checkpoint) / _HISTORY).write_text(json.dumps(list(self._losses)), encoding="utf-8")

    def load(self, checkpoint: str | Path) -> None:
        """Take the last losses from a checkpoint, if it has them."""
        path = Path(checkpoint) / _HISTORY
        if path.is_file():
            self._losses.clear()
            self._losses.extend(json.loads(path.read_text(encoding="utf-8")))

    def _error(self, what: str) -> LossError:
        found = self._example_ids() if callable(self._example_ids) else self._example_ids
        listed = ", ".join(str(int(example)) for example in found[:_LISTED]) or "unknown"
        more = len(found) - _LISTED
        return LossError(
            f"Step {self._step}: {what}. This step was not taken.\n"
            f"Examples of its global batch: {listed}{f' and {more:,} more' if more > 0 else ''}.\n"
            f"{last_good(self.output_dir, self._step)}"
        )


def last_good(output_dir: str | Path | None, step: int) -> str:
    """Which checkpoint to go back to from a bad step, and what to do, as the end of an error message."""
    good = None
    if output_dir is not None:
        good = last_complete_checkpoint(output_dir, before=step) or last_written_checkpoint(output_dir, before=step)
    where = f"Last good checkpoint: {good}." if good else "There is no complete checkpoint yet (see save_steps)."
    return (
        f"{where}\nLower learning_rate (or lengthen the warm-up), or look at these examples and leave bad ones out of "
        f"the dataset; then {f'resume from {good}' if good else 'start again'}. If the loss was already bad at the "
        "first step, look at the teacher and the student."
    )


__all__ = ["LossError", "LossGuard", "last_good"]
