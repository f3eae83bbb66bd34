"""
Distil a chain of anchors from a source model: source -> A1 -> A2 -> ...

Hardware: that of the config; gpt2_chain.yaml names its own. Tiny models run on a CPU.

    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml recipes/build_chain.py \
        --config recipes/configs/gpt2_chain.yaml

Options on the command line override the YAML file: `--learning_rate 1e-5`, `--max_steps 100`. The same command again
resumes a build that was stopped. `cbd build` is the same in one process. Fields of the YAML file: docs/building.md.
"""

import sys


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # this folder, whose evaluate.py would hide the `evaluate` library

    from cbd_hf.cli import run

    run(["build", *sys.argv[1:]])
