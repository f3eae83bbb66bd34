"""benchmarks/coverage.py on a few types: one line of JSON, and each verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "coverage.py"


def test_verdicts() -> None:
    command = [sys.executable, str(SCRIPT), "--json", "--types", "gpt2,gemma,bert,gemma3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240, env=environment).stdout
    (line,) = output.splitlines()
    assert json.loads(line) == {"works": ["gpt2", "gemma"], "refuses": ["bert", "gemma3"], "wrong": []}
