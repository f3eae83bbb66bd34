"""
A source of another tokenizer teaches a student: what the alignment sees, then a few steps of training.

    python examples/bridge_two_tokenizers.py source-directory student-directory bridge

Both are directories or Hub ids; their tokenizers and architectures may differ.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hf import BridgeDataCollator, BridgeDistillationConfig, BridgeDistillationTrainer


ROWS = [
    {"prompt": "Once upon a time, there was a", "completion": " little girl named Lily. She loved to play outside."},
    {"prompt": "One day, Tom found a big", "completion": " box in the garden. He wanted to see what was inside."},
    {"prompt": "The dog was very happy because", "completion": " he had a new ball. He ran and ran all day."},
    {"prompt": "Mom said to Sam:", "completion": " Please be careful with the cup. It is hot."},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="directory or Hub id of the model that teaches")
    parser.add_argument("student", help="directory or Hub id of the model that becomes the bridge")
    parser.add_argument("output_dir", help="where the bridge goes: into its subfolder anchor")
    parser.add_argument("--max_steps", type=int, default=20)
    args = parser.parse_args()

    own, other = (AutoTokenizer.from_pretrained(path) for path in (args.student, args.source))
    row = {name: values[0] for name, values in BridgeDataCollator(own, other).encode(ROWS[:1]).items()}
    for span in range(max(row["spans"]) + 1):
        sides = (("student", own, "input_ids", "spans"), ("source", other, "source_input_ids", "source_spans"))
        for name, tokenizer, ids, spans in sides:
            tokens = [token for token, number in zip(row[ids], row[spans], strict=True) if number == span]
            print(f"span {span} {name:<8}", tokenizer.convert_ids_to_tokens(tokens))

    config = BridgeDistillationConfig(
        output_dir=f"{args.output_dir}/training",
        method="overlap_kl",  # or alm, uld, mined
        cross_entropy_weight=0.5,
        max_steps=args.max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype="float32")
    trainer = BridgeDistillationTrainer(student, args.source, config, train_dataset=Dataset.from_list(ROWS))
    trainer.train()
    trainer.save_anchor(f"{args.output_dir}/anchor")  # anchor zero of a chain


if __name__ == "__main__":
    main()
