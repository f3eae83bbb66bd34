"""
Fine-tune a model on databricks-dolly-15k (or other instructions) with TRL's SFTTrainer.

Hardware: one 24 GB GPU for models up to 1B parameters; runs on a CPU for models of some million parameters.

    accelerate launch recipes/finetune_dolly.py --config recipes/configs/finetune_dolly.yaml \
        --model_name_or_path my-target --output_dir my-target-dolly

Options on the command line override the YAML file: `--dataset my.jsonl`, `--num_train_epochs 1`, `--use_peft`.
Evaluate with recipes/evaluate_model.py and the same eval_size and split_seed.
"""

from cbd_hf.commands.finetune import main


if __name__ == "__main__":
    main()
