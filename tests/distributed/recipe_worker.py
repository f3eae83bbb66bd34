"""
Run a recipe with its arguments; FSDP also on a CPU.

    accelerate launch ... -m tests.distributed.recipe_worker recipes/build_chain.py --config ...
"""

from __future__ import annotations

import runpy
import sys

from .split_worker import allow_fsdp_on_cpu


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
