"""
Reach a source of another tokenizer: let it answer prompts, then train a bridge of the chain's own family on them.

Hardware: whatever runs the source, then whatever trains the bridge; N processes share the work.

    accelerate launch recipes/bridge.py generate --source my-source --dataset databricks/databricks-dolly-15k \
        --output_dir my-answers

Run the same command again after an interruption. `cbd bridge` is the same in one process.
"""

import sys


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # this folder, whose evaluate.py would hide the `evaluate` library

    from cbd_hf.cli import run

    run(["bridge", *sys.argv[1:]])
