"""
One stage of stepwise distillation by hand: a teacher, a smaller student of the same vocabulary, and a few rows.

    python examples/distil_one_stage.py teacher-directory student-directory distilled

The completions are supervised, the prompts are not. `accelerate launch` runs it on several processes.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM

from cbd_hf import StepwiseDistillationConfig, StepwiseDistillationTrainer


ROWS = [
    {"prompt": "Once upon a time, there was a", "completion": " little girl named Lily. She loved to play outside."},
    {"prompt": "One day, Tom found a big", "completion": " box in the garden. He wanted to see what was inside."},
    {"prompt": "The dog was very happy because", "completion": " he had a new ball. He ran and ran all day."},
    {"prompt": "Mom said to Sam:", "completion": " Please be careful with the cup. It is hot."},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="directory or Hub id")
    parser.add_argument("student", help="directory or Hub id of a smaller model with the same tokenizer")
    parser.add_argument("output_dir", help="where the distilled student goes")
    parser.add_argument("--max_steps", type=int, default=20)
    args = parser.parse_args()

    config = StepwiseDistillationConfig(
        output_dir=args.output_dir,
        objective="reverse_kl",  # or forward_kl, generalized_jsd
        temperature=1.0,
        max_steps=args.max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    # A path loads in the type it was saved in; training wants float32 weights.
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype="float32")
    trainer = StepwiseDistillationTrainer(student, args.teacher, config, train_dataset=Dataset.from_list(ROWS))
    trainer.train()
    trainer.save_anchor(args.output_dir)  # a plain checkpoint; a directory of such models can become a chain


if __name__ == "__main__":
    main()
