"""
Run a teacher once over a dataset and keep its predictions, so that students are distilled without it.

Hardware: whatever runs the teacher; N processes share the work. Disk: 258 bytes per supervised token with k = 64.

    accelerate launch recipes/cache_teacher.py --config recipes/configs/cache_teacher.yaml \
        --teacher_model_name_or_path my-teacher --output_dir my-cache

Options on the command line override the YAML file: `--dataset my.jsonl`, `--variant sampled`, `--append true`. Run the
same command again after an interruption. `cbd cache` is the same in one process.
"""

import sys


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # this folder, whose evaluate.py would hide the `evaluate` library

    from cbd_hf.cli import run

    run(["cache", *sys.argv[1:]])
