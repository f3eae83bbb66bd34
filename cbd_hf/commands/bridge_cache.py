"""`cbd bridge cache`: what a source says of a dataset that a bridge of other tokens will be trained on."""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cbd_hf.commands.arguments import parse_options
from cbd_hf.commands.bridge_train import BridgeArguments, checkpoint, load_rows
from cbd_hf.data.columns import SOURCE_PROMPTS
from cbd_hf.distillation.cache.manifest import DTYPES, CacheSettings


_DESCRIPTION = """
Run a source once over a dataset, in its own tokens, and keep its predictions: the k likeliest tokens and the token of
the data. `cbd bridge train --teacher_cache DIR` with the same options of rows needs the source's tokenizer only.
"""


@dataclass
class BridgeCacheArguments(BridgeArguments):
    """What is kept, and what the rows are: options of rows as in the training."""

    output_dir: str = field(default="", metadata={"help": "Directory of the cache: new, or one to finish."})
    k: int = field(default=64, metadata={"help": "Most likely tokens kept per position."})
    temperature: float = field(default=1.0, metadata={"help": "Of the source; the loss must have the same."})
    log_prob_dtype: str = field(
        default="float16", metadata={"help": "How log-probabilities are stored.", "choices": list(DTYPES)}
    )
    hidden: str | None = field(
        default=None, metadata={"help": "Also keep the last hidden states, in this type.", "choices": list(DTYPES)}
    )
    shard_rows: int = field(default=1024, metadata={"help": "Rows per file; one file at a time is in memory."})
    batch_size: int = field(default=8, metadata={"help": "Sequences per forward pass of the source."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Of the source's weights; auto: as its config says.", "choices": ["auto", *DTYPES]},
    )
    append: bool = field(default=False, metadata={"help": "Add the rows of another dataset."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a row of the student, as in the training."})
    source_max_length: int | None = field(default=None, metadata={"help": "As in the training."})
    source_prompt: str = field(
        default="same", metadata={"help": "As in the training.", "choices": list(SOURCE_PROMPTS)}
    )
    completion_only_loss: bool | None = field(default=None, metadata={"help": "As in the training."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column of the text."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the checkpoint brings."})


def run(args: BridgeCacheArguments) -> Any:
    """
    Make, finish or extend a cache of a source's predictions, and print what it holds.

    Returns:
        [`~cbd_hf.distillation.cache.CacheReport`]

    Raises:
        ValueError: no source or output_dir is given, or see [`~cbd_hf.distillation.cache.build_cache`].
    """
    from accelerate import PartialState

    from cbd_hf.commands.cache import format_report
    from cbd_hf.distillation.bridge.source_cache import collator_of, prepare_pairs, source_rows
    from cbd_hf.distillation.cache.build import build_cache
    from cbd_hf.distillation.preparation import check_max_length
    from cbd_hf.distillation.teacher import load_config, load_tokenizer
    from cbd_hf.tokenization.limits import Limits

    for name in ("source", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"{name} is needed: give --{name}.")
    check_max_length(args.max_length)
    settings = CacheSettings(
        k=args.k,
        temperature=args.temperature,
        dtype=args.log_prob_dtype,
        hidden=args.hidden,
        labels=True,
        shard_rows=args.shard_rows,
    )
    places = [checkpoint(path, weights=False) for path in (args.model, args.source)]
    tokenizer, source = (load_tokenizer(path, None, args.trust_remote_code) for path in places)
    limits = [Limits.of(load_config(path, None, args.trust_remote_code)) for path in places]
    collator = collator_of(args, tokenizer, source, limits)
    with PartialState().main_process_first():
        pairs = prepare_pairs(load_rows(args, args.dataset_text_field), collator, args.dataset_num_proc)
    report = build_cache(
        str(args.source),
        source_rows(pairs),
        args.output_dir,
        settings,
        tokenizer=source,
        name=args.dataset,
        dtype=args.dtype,
        batch_size=args.batch_size,
        append=args.append,
        trust_remote_code=args.trust_remote_code,
    )
    if PartialState().is_main_process:
        print(format_report(report))
    return report


def cache(argv: Sequence[str]) -> None:
    """Parse the options of `cbd bridge cache` (and `--config file.yaml`) and [`run`]."""
    (args,) = parse_options(
        BridgeCacheArguments,
        argv,
        prog="cbd bridge cache",
        usage="cbd bridge cache --model M --source S --dataset D --output_dir DIR ...",
        description=_DESCRIPTION,
    )
    run(args)


__all__ = ["BridgeCacheArguments", "cache", "run"]
