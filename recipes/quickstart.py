"""
The whole method on a small real model: build a chain, make models of several sizes from it, measure them.

Hardware: a CPU with 2 cores and 8 GB, one process. `make quickstart` installs what this needs and runs it.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/quickstart.py

`--source` and `--text` take another model and text. `cbd quickstart` is the same.
"""

import sys


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # this folder, whose evaluate.py would hide the `evaluate` library

    from cbd_hf.cli import run

    run(["quickstart", *sys.argv[1:]])
