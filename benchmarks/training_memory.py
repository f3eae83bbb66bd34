"""
Predicted and measured peak memory of distillation in CPU processes, as a Markdown table.

    python benchmarks/training_memory.py [setting ...]

Every setting of tests/training_memory/measuring.py, in one process and in two with DDP, ZeRO-1, ZeRO-2 and ZeRO-3.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.training_memory.measuring import LAUNCHES, SETTINGS, measured, predicted  # noqa: E402


def main() -> None:
    print("| setting | launch | predicted MB | measured MB | difference | most in |\n|---|---|---|---|---|---|")
    for setting in sys.argv[1:] or SETTINGS:
        for launch in LAUNCHES:
            memory, peak = predicted(setting, launch), measured(setting, launch)
            print(
                f"| {setting} | {launch} | {memory.total / 1e6:.0f} | {peak / 1e6:.0f} | "
                f"{100 * (memory.total / peak - 1):+.1f}% | {memory.phase} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
