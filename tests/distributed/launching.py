"""Starting programs with the accelerate configs of recipes/, on a CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
# Config -> what it lacks on a CPU, as environment and as options of `accelerate launch`.
_TWO = ["--num_processes=2", "--mixed_precision=no"]
_ON_CPU: dict[str, tuple[dict[str, str], list[str]]] = {
    "cpu": ({}, []),
    "single": ({}, []),
    "cpu_2proc": ({"ACCELERATE_USE_CPU": "true"}, []),
    "ddp": ({"ACCELERATE_USE_CPU": "true"}, _TWO),
    "zero1": ({"DS_ACCELERATOR": "cpu"}, _TWO),
    "zero2": ({"DS_ACCELERATOR": "cpu"}, _TWO),
    "zero3": ({"DS_ACCELERATOR": "cpu"}, _TWO),
    # DeepSpeed compiles an optimizer of its own for this, which takes minutes the first time.
    "zero3_offload": (
        {"DS_ACCELERATOR": "cpu"},
        _TWO if os.environ.get("CBD_TEST_CPU_ADAM") else [*_TWO, "--offload_optimizer_device=none"],
    ),
    "fsdp2": ({}, _TWO),
}


def launch(config: str, *program: str, timeout: float = 400, **environment: str) -> None:
    """Run `accelerate launch` with a config of recipes/accelerate_configs, on the CPU."""
    more, options = _ON_CPU[config]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += [f"--config_file={CONFIGS / config}.yaml", *options, f"--main_process_port={port}", *program]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        # Workers have sessions of their own: a launcher that is asked to end ends them, a killed one leaves them.
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{output[-6000:]}")


def run_cases(config: str, runs: dict[str, list[Any]], material: Path, output: Path) -> dict[str, dict[str, Any]]:
    """
    One launch of tests/distributed/split_worker.py.

    Args:
        config (`str`): of recipes/accelerate_configs.
        runs (`dict[str, list]`): label -> name of the case, rows of a micro-batch, accumulation steps and more
            options.
        material (`Path`): from [`make_material`].
        output (`Path`): for gradients and weights, named by the labels.

    Returns:
        `dict[str, dict]`: label -> what was logged.
    """
    output.mkdir(parents=True, exist_ok=True)
    plan = output / "plan.json"
    plan.write_text(json.dumps({"runs": runs, "material": str(material), "output": str(output)}))
    launch(config, "-m", "tests.distributed.split_worker", str(plan))
    return json.loads((output / "results.json").read_text())
