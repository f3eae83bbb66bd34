"""
Largest relative difference between the gradient of one global batch computed whole and split.

    python benchmarks/gradient_split.py

Off- and on-policy: the gradient of 8 samples in one micro-batch, against every split into micro-batches and
accumulation steps, in float32, as in tests/distillation/test_gradient_split.py. Over processes and kinds of sharding:
pytest -s tests/distributed/test_splits.py. Prints one line per mode: the largest over parameters of |a - b| / |a|.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.distillation.test_gradient_split import MODES  # noqa: E402
from tests.distributed.gradient_worker import gradient, relative_difference  # noqa: E402


def main() -> None:
    for mode, options in MODES.items():
        with contextlib.redirect_stdout(io.StringIO()):
            whole = gradient(8, 1, **options)
            splits = {split: gradient(*split, **options) for split in ((4, 2), (2, 4), (1, 8))}
        worst = max(relative_difference(whole["gradient"], split["gradient"]) for split in splits.values())
        loss = max(abs(split["loss"] - whole["loss"]) / whole["loss"] for split in splits.values())
        print(f"{mode:16} gradient {worst:.1e}  logged loss {loss:.1e}")


if __name__ == "__main__":
    main()
