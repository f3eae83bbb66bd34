"""
Give a model the vocabulary of another tokenizer, to start a bridge from its weights.

Hardware: one process on the CPU, memory for the model (and the donor); docs/transplant.md has times.

    accelerate launch --cpu --num_processes 1 recipes/transplant_vocabulary.py --model my-source \
        --tokenizer my-chain/anchors/0-large --output_dir my-bridge

With `--method omp --donor my-chain/anchors/0-large` rows are made from shared tokens that resemble the new ones in the
donor. `cbd transplant` is the same.
"""

import sys


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # this folder, whose evaluate.py would hide the `evaluate` library

    from cbd_hf.cli import run

    run(["transplant", *sys.argv[1:]])
