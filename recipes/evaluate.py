"""
Held-out loss (nats per token, bits per byte) and Rouge-L of a model by the published instruction-following protocol.

Hardware: one GPU, or a CPU for small models (five seeds of 256 sampled tokens for each example take the time).

    accelerate launch --num_processes 1 recipes/evaluate.py --config recipes/configs/evaluate.yaml \
        --model_name_or_path my-target-dolly --output_file my-target-dolly.json

One process does it all. Options on the command line override the YAML file: `--dataset my.jsonl`, `--seeds 10`,
`--texts my.txt`. `cbd eval` is the same.
"""

import sys


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # this folder, whose evaluate.py would hide the `evaluate` library

    from cbd_hf.cli import run

    run(["eval", *sys.argv[1:]])
