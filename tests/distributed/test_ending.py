"""Processes that have worked together end without an error of their threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .launching import launch


@pytest.mark.distributed
def test_threads_do_not_abort_a_process_that_is_done() -> None:
    launch("cpu_2proc", "-m", "tests.distributed.ending_worker")


@pytest.mark.parametrize(("code", "grouped", "torn_down"), [(0, True, False), (0, False, True), (3, True, True)])
def test_hooks_run_and_the_code_is_kept(code: int, grouped: bool, torn_down: bool) -> None:
    """Of several processes, a successful one skips Python's teardown, but not the hooks."""
    program = f"""
import os
from cbd_hf._ending import run_and_end

class Left:
    def __del__(self, write=os.write):
        write(1, b"torn down")

def main():
    import atexit
    import torch.distributed
    atexit.register(os.write, 1, b"hook ")
    if {grouped}:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    global left
    left = Left()
    return {code}

run_and_end(main)
"""
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert made.returncode == code, made.stderr
    assert made.stdout.split(maxsplit=1) == ["hook", *(["torn down"] if torn_down else [])]
