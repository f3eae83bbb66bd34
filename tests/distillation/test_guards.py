"""The guard of the loss: what it stops, what it lets pass, and what it says."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from cbd_hf.distillation.checkpoints import mark_complete
from cbd_hf.distillation.guards import LossError, LossGuard


def guard_after(losses: list[float], **options: float) -> LossGuard:
    guard = LossGuard(**{"factor": 10.0} | options)  # type: ignore[arg-type]
    for step, loss in enumerate(losses, 1):
        guard.check(loss, step, [step])
    return guard


def checkpoint(directory: Path, step: int, complete: bool = True) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")
    if complete:
        mark_complete(path)
    return path


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_not_finite_names_everything(loss: float, tmp_path: Path) -> None:
    for step in (2, 4, 9):  # 9: left by another run
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 6, complete=False)
    guard = LossGuard(output_dir=tmp_path)
    with pytest.raises(LossError) as caught:
        guard.check(loss, 7, range(100, 150))
    text = str(caught.value)
    assert f"Step 7: the loss is {loss}" in text
    assert "100, 101, " in text and "131 and 18 more" in text and "132" not in text
    assert f"Last good checkpoint: {tmp_path / 'checkpoint-4'}." in text
    assert "learning_rate" in text and "resume from" in text


def test_without_a_checkpoint() -> None:
    with pytest.raises(LossError, match=r"Examples of its global batch: 3, 4\.\nThere is no complete checkpoint yet"):
        LossGuard().check(math.nan, 1, [3, 4])


def test_explosion_is_measured_at_the_median() -> None:
    guard = guard_after([2.0] * 9 + [15.0])  # nine losses set no limit, and one outlier does not raise it
    assert guard.limit == 20.0
    guard.check(19.9, 11, [])
    with pytest.raises(LossError, match=r"Step 12: the loss is 20\.1, more than the limit of 20 .*10 times the"):
        guard.check(20.1, 12, [])
    guard.check(2.0, 12, [])  # the bad one was not accepted
    assert guard.limit == 20.0


def test_small_and_negative_losses_do_not_explode() -> None:
    guard = guard_after([1e-6] * 20)
    guard.check(0.9, 21, [])
    with pytest.raises(LossError, match="at least 1"):
        guard.check(1.1, 22, [])
    guard_after([-0.1] * 20).check(0.9, 21, [])


def test_a_usual_run_passes() -> None:
    rng = random.Random(0)
    guard_after([5 * math.exp(-step / 100) * rng.lognormvariate(0, 0.4) for step in range(1000)])


def test_warm_up_and_no_limit() -> None:
    guard_after([0.1, 1e9, 0.1])
    guard_after([1.0] * 30 + [1e9], factor=0)
    assert guard_after([3.0] * 30, factor=2, window=5, warm_up=1).limit == 6.0


def test_gradient() -> None:
    guard = guard_after([1.0] * 10)
    guard.check_gradient(1e9)  # clipped later, and no reason to stop
    guard.check(1.0, 11, [8])
    with pytest.raises(LossError, match=r"Step 11: the norm of the gradient is nan[^\0]*batch: 8\."):
        guard.check_gradient(math.nan)


def test_examples_are_asked_for_only_to_be_named() -> None:
    asked: list[int] = []

    def examples() -> list[int]:
        asked.append(1)
        return [5, 6]

    guard = LossGuard()
    guard.check(1.0, 1, examples)
    assert not asked
    with pytest.raises(LossError, match=r"Step 1: .*\n.*batch: 5, 6\."):
        guard.check_gradient(math.inf)
    with pytest.raises(LossError, match=r"batch: 5, 6\."):
        guard.check(math.nan, 2, examples)
    assert len(asked) == 2


def test_resumes_with_its_history(tmp_path: Path) -> None:
    guard_after([2.0] * 12).save(tmp_path)
    guard = LossGuard(10.0)
    guard.load(tmp_path / "none")
    assert guard.limit is None
    guard.load(tmp_path)
    with pytest.raises(LossError, match="last 12 steps"):
        guard.check(50.0, 13, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"factor": 1.0}, "factor=1.0 must be above 1"), ({"factor": -2}, "factor=-2"), ({"warm_up": 60}, "warm_up=60")],
)
def test_wrong_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossGuard(**options)  # type: ignore[arg-type]
