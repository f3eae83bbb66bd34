"""Predictions against the peak memory of real processes; benchmarks/training_memory.py has the whole table."""

from __future__ import annotations

import pytest

from .measuring import LAUNCHES, measured, predicted


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("setting", "launch"), [("activations", "single"), ("weights", "zero2"), ("weights", "zero3")]
)
def test_prediction_is_within_a_tenth_of_what_is_measured(setting: str, launch: str) -> None:
    if launch.startswith("zero"):
        pytest.importorskip("deepspeed")
    prediction, measurement = predicted(setting, launch).total, measured(setting, launch)
    assert prediction == pytest.approx(measurement, rel=0.1), LAUNCHES[launch]
