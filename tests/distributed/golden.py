"""
Golden values: loss and norm of the gradient of every case, from one process with the whole batch.

    python -m tests.distributed.golden

prints how far they are from golden.json and writes it anew. test_splits.py holds every split to them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from .cases import CASES, make_material
from .launching import run_cases


PATH = Path(__file__).with_name("golden.json")
GLOBAL_BATCH = 8


def reference_runs() -> dict[str, list[Any]]:
    """All cases with the whole batch at once."""
    return {name: [name, GLOBAL_BATCH, 1, {}] for name in CASES}


def values_of(results: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Case -> the norm of the first step's gradient, and the losses of all steps."""
    return {name: [result["norm"], *result["loss"]] for name, result in results.items()}


def difference(expected: list[float], found: list[float]) -> float:
    """The largest relative one."""
    return max(abs(one - other) / abs(one) for one, other in zip(expected, found, strict=True))


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        material = Path(directory) / "material"
        make_material(material)
        values = values_of(run_cases("cpu", reference_runs(), material, Path(directory) / "runs"))
    old = json.loads(PATH.read_text()) if PATH.exists() else {}
    for name, found in values.items():
        known = name in old and len(old[name]) == len(found)
        print(f"{name:24} {f'{difference(old[name], found):.1e}' if known else 'new'}")
    for name in old.keys() - values.keys():
        print(f"{name:24} removed")
    PATH.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
