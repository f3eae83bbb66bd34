"""
Make models of any size from a chain, saved as ordinary checkpoints with tokenizer.

Hardware: a CPU; the memory of one target. Nothing is trained, so one process does it all.

    accelerate launch recipes/init_from_chain.py --config recipes/configs/init_from_chain.yaml --n_params 138e6

Options on the command line override the YAML file: `--n_params 138e6,220e6` (a folder for each size), `--alpha 0.5`,
`--initializer cut`. `cbd init CHAIN --n_params 138e6 --output_dir DIR` is the same.
"""

import sys


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # this folder, whose evaluate.py would hide the `evaluate` library

    from cbd_hf.cli import run

    run(["init", *sys.argv[1:]])
