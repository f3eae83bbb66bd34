"""The gradient and the logged loss of a global batch do not depend on how it is split."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..distributed.gradient_worker import gradient, relative_difference


ROOT = Path(__file__).parents[2]
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


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["reverse_kl", "on_policy"])
def test_two_processes(mode: str, tmp_path: Path) -> None:
    whole = gradient(8, 1, **MODES[mode])
    for micro_batch, accumulation in ((4, 1), (2, 2)):
        path = tmp_path / f"{micro_batch}.pt"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        options = [f"--{name}={value}" for name, value in MODES[mode].items()]
        subprocess.run(
            [
                *launch,
                "-m",
                "tests.distributed.gradient_worker",
                f"--micro_batch={micro_batch}",
                f"--accumulation={accumulation}",
                f"--path={path}",
                *options,
            ],
            check=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            timeout=120,
            capture_output=True,
        )
        split = torch.load(path, weights_only=True)
        assert relative_difference(whole["gradient"], split) < 1e-5
