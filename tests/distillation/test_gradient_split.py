"""
The gradient and the logged loss of a global batch do not depend on how it is split into micro-batches.

Over processes and kinds of sharding: tests/distributed/test_splits.py.
"""

from __future__ import annotations

import pytest

from ..distributed.gradient_worker import gradient, relative_difference


MODES = {
    "reverse_kl": {},
    "forward_kl": {"objective": "forward_kl", "cross_entropy_weight": 0.5},
    "generalized_jsd": {"objective": "generalized_jsd", "temperature": 2.0},
    "on_policy": {"lmbda": 1.0},
}


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_and_accumulation(mode: str) -> None:
    whole = gradient(8, 1, **MODES[mode])
    assert sum(float(g.norm()) for g in whole["gradient"].values()) > 1e-3
    for micro_batch, accumulation in ((4, 2), (1, 8)):
        split = gradient(micro_batch, accumulation, **MODES[mode])
        assert relative_difference(whole["gradient"], split["gradient"]) < 1e-5
        assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
