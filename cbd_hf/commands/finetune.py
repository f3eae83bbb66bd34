"""Fine-tune a causal language model on instructions with TRL's own `SFTTrainer`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig, SFTConfig

from cbd_hf.commands.arguments import parse_options


logger = logging.getLogger(__name__)

MERGED_DIRECTORY = "merged"


@dataclass
class FinetuneArguments:
    """What to fine-tune on, and what to hold out of it."""

    dataset: str = field(
        default="databricks/databricks-dolly-15k",
        metadata={"help": "Instructions: a Hub id, or a .jsonl, .json or .parquet file."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of dataset."})
    max_examples: int | None = field(default=None, metadata={"help": "Use the first examples of dataset only."})
    eval_size: int | None = field(
        default=None,
        metadata={"help": "Hold this many examples out of the training, for cbd eval and for eval_strategy."},
    )
    split_seed: int = field(default=0, metadata={"help": "Decides which examples are held out."})
    max_prompt_tokens: int | None = field(
        default=None,
        metadata={"help": "Drop training examples with longer prompts (published protocol: 256)."},
    )
    merge_adapter: bool = field(
        default=False,
        metadata={"help": f"With use_peft: also save the model with the adapter merged, in {MERGED_DIRECTORY}/."},
    )


@dataclass
class FinetuneConfig(SFTConfig):
    """`SFTConfig` that trains on the CPU in float32 where there is no accelerator, unless told otherwise."""

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
            # None would mean True, which is slower than float32 on most processors.
            self.bf16 = bool(self.bf16)
        super().__post_init__()


def run(args: FinetuneArguments, config: SFTConfig, model_config: ModelConfig) -> dict[str, float]:
    """
    Fine-tune and save model and tokenizer in `config.output_dir`.

    The loss covers the completion only. With `model_config.use_peft` the adapter is saved, and the merged model beside
    it if `args.merge_adapter` is set. They appear in `output_dir` at the end, when they are whole; before that there
    are only checkpoints (`save_steps`), of which `resume_from_checkpoint` takes the last that was written to its end.

    Returns:
        `dict[str, float]`: the metrics of the training (`train_loss`, `train_runtime`, ...).

    Raises:
        FileExistsError: `output_dir` is not empty and the training is not resumed.
        ValueError: no model, options that do not go together, data in no known layout, or nothing to resume from.
        DiskFullError: a checkpoint or the result does not fit on the disk; what was there before is unharmed.
    """
    from trl import SFTTrainer, get_peft_config

    from ..distillation.preparation import check_rows
    from ..distillation.resuming import save_whole, train_resumably

    _check(args, config, model_config)
    model, tokenizer = _load_model(model_config)
    train, held_out = _load_data(args, tokenizer)
    if held_out is None and config.eval_strategy != "no":
        raise ValueError(f"eval_strategy={config.eval_strategy} needs held-out examples; set eval_size.")
    config.completion_only_loss = True
    check_rows(train, tokenizer, config)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
    )
    output = train_resumably(trainer, _resume_point(config))

    def save(directory: Path) -> None:
        trainer.save_model(str(directory))
        if args.merge_adapter and trainer.is_world_process_zero():
            _save_merged(directory, tokenizer)

    save_whole(Path(str(config.output_dir)), save, keys=("adapter_config.json", "config.json"))
    return output.metrics


def _check(args: FinetuneArguments, config: SFTConfig, model_config: ModelConfig) -> None:
    from ..distillation.preparation import check_max_length

    if model_config.model_name_or_path is None:
        raise ValueError("No model to fine-tune: set model_name_or_path.")
    if args.merge_adapter and not model_config.use_peft:
        raise ValueError("merge_adapter needs an adapter: set use_peft, or leave merge_adapter out.")
    if model_config.load_in_4bit or model_config.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are not supported here; use trl sft for QLoRA.")
    check_max_length(config.max_length)
    output = Path(str(config.output_dir))
    # Only the first process looks: a slower one could already see what the first has written.
    if config.process_index == 0 and _resume_point(config) is None and output.is_dir() and any(output.iterdir()):
        raise FileExistsError(
            f"{output} is not empty; choose another output_dir, or continue with resume_from_checkpoint true."
        )


def _resume_point(config: SFTConfig) -> str | None:
    """A checkpoint directory: the one that was named, or the last complete one in output_dir; None to start anew."""
    from ..distillation.checkpoints import last_complete_checkpoint

    # A command line gives text, a YAML file a bool.
    chosen = str(config.resume_from_checkpoint or "").strip()
    if chosen.lower() in {"", "false", "none"}:
        return None
    if chosen.lower() != "true":
        return chosen
    last = last_complete_checkpoint(str(config.output_dir))
    if last is None:
        raise ValueError(
            f"{config.output_dir} has no checkpoint that was written to its end, so there is nothing to resume from: "
            "leave resume_from_checkpoint out and choose an empty output_dir, or give a checkpoint's path."
        )
    return last


def _load_model(model_config: ModelConfig) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..data.sources import resolve_checkpoint

    checkpoint = resolve_checkpoint(str(model_config.model_name_or_path))
    options = {"revision": model_config.model_revision}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
    if tokenizer.pad_token_id is None:
        # Padded positions are masked, so that any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=model_config.dtype, attn_implementation=model_config.attn_implementation, **options
    )
    return model, tokenizer


def _load_data(args: FinetuneArguments, tokenizer: Any) -> tuple[Any, Any]:
    from ..data.instructions import drop_long_prompts, load_instructions, split_instructions

    dataset = load_instructions(args.dataset, split=args.dataset_split, max_examples=args.max_examples)
    held_out = None
    if args.eval_size is not None:
        # Divided before long prompts are dropped, so that cbd eval finds the same division without a tokenizer.
        dataset, held_out = split_instructions(dataset, args.eval_size, args.split_seed)
    if args.max_prompt_tokens is not None:
        dataset = drop_long_prompts(dataset, args.max_prompt_tokens, tokenizer)
    columns = ["prompt", "completion"]
    return dataset.select_columns(columns), held_out.select_columns(columns) if held_out is not None else None


def _save_merged(directory: Path, tokenizer: Any) -> None:
    from peft import AutoPeftModelForCausalLM

    from .._loading import plain_loading

    # Read back from the adapter's files: the trainer has changed the forward of the model in memory.
    with plain_loading():
        merged = AutoPeftModelForCausalLM.from_pretrained(directory).merge_and_unload()
    merged.save_pretrained(directory / MERGED_DIRECTORY)
    tokenizer.save_pretrained(directory / MERGED_DIRECTORY)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line (and `--config file.yaml`) and [`run`]."""
    classes = (FinetuneArguments, FinetuneConfig, ModelConfig)
    args, config, model_config = parse_options(classes, argv, prog="cbd finetune", description=__doc__)
    run(args, config, model_config)


__all__ = ["FinetuneArguments", "FinetuneConfig", "main", "run"]
