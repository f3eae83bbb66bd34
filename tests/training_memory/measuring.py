"""Measured and predicted memory of settings, in real processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cbd_hf.training_memory import StageMemory, TrainingWorkload, predict_stage
from tests.training_memory.worker import config_of


ROOT = Path(__file__).parents[2]


def _models(rows: int, length: int, student: int, teacher: int, **options: Any) -> dict[str, Any]:
    shared = {"head_dim": 64, "vocab_size": 8192, "max_position_embeddings": 512}
    return {
        "student": {"layers": 6, "heads": student, **shared},
        "teacher": {"layers": 8, "heads": teacher, **shared},
        "rows": rows,
        "length": length,
        "options": options,
    }


SETTINGS = {
    "activations": _models(4, 256, 4, 6),
    "checkpointing": _models(8, 256, 4, 6, gradient_checkpointing=True),
    "weights": _models(1, 64, 8, 10),
}
"""8M -> 21M Llamas where the activations are most, with and without checkpointing; 28M and 54M with few tokens."""

# Name -> ZeRO stage and processes.
LAUNCHES = {"single": ("0", 1), "cpu_2proc": ("0", 2), "zero1": ("1", 2), "zero2": ("2", 2), "zero3": ("3", 2)}


def predicted(setting: str, launch: str) -> StageMemory:
    """The prediction for a setting and a launch."""
    values = SETTINGS[setting]
    stage, processes = LAUNCHES[launch]
    workload = TrainingWorkload(
        max_length=values["length"],
        per_device_train_batch_size=values["rows"],
        gradient_checkpointing=values["options"].get("gradient_checkpointing", False),
        device="cpu",
    )
    configs = (config_of(values[role]) for role in ("teacher", "student"))
    (memory,) = predict_stage(*configs, workload, zero_stages=[stage], world_sizes=[processes])
    return memory


def measured(setting: str, launch: str) -> int:
    """The largest peak of the processes, in bytes above what each had before it made the models."""
    program = [sys.executable]
    # Freed memory goes back at once, and all threads share one heap.
    environment = {
        "HF_HUB_OFFLINE": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    if launch != "single":
        environment |= {"ACCELERATE_USE_CPU": "true"} if launch == "cpu_2proc" else {"DS_ACCELERATOR": "cpu"}
        file = ROOT / f"recipes/accelerate_configs/{launch}.yaml"
        options = [f"--config_file={file}", "--num_processes=2", "--mixed_precision=no"]
        program += ["-m", "accelerate.commands.accelerate_cli", "launch", *options]
    with tempfile.TemporaryDirectory() as directory:
        result = subprocess.run(
            [*program, "-m", "tests.training_memory.worker", json.dumps(SETTINGS[setting]), directory],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        # One file per process: their lines would run into each other.
        peaks = [json.loads(path.read_text())["peak"] for path in Path(directory).glob("*.json")]
    assert len(peaks) == LAUNCHES[launch][1]
    return max(peaks)
