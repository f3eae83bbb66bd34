"""
Fine-tune a model on databricks-dolly-15k (or other instructions) with TRL's SFTTrainer.

Hardware: one 24 GB GPU for models up to 1B parameters; runs on a CPU for models of some million parameters.

    accelerate launch recipes/finetune_dolly.py --config recipes/configs/finetune_dolly.yaml \
        --model_name_or_path my-target --output_dir my-target-dolly

Options on the command line override the YAML file: `--dataset my.jsonl`, `--num_train_epochs 1`, `--use_peft`.
Evaluate with recipes/evaluate.py and the same eval_size and split_seed. `cbd finetune` is the same in one process.
"""

import sys


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # this folder, whose evaluate.py would hide the `evaluate` library

    from cbd_hf.cli import run

    run(["finetune", *sys.argv[1:]])
