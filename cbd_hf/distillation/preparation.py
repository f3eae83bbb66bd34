"""The rows that a trainer makes of a dataset, for whatever needs the same rows without a student."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, IterableDataset, Value
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, get_training_chat_template

from cbd_hf.data.columns import IGNORED, dataset_kind
from cbd_hf.distillation.columns import NO_ROWS, supervise_turns


def supervise_conversations(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    formatting_func: Callable[[dict], str] | None = None,
) -> Dataset | IterableDataset:
    """
    A dataset of `messages` as `input_ids` and `labels` with every assistant turn supervised; any other unchanged.

    `SFTTrainer` would supervise the user's turns too, or need `{% generation %}` markers in the template. With
    `completion_only_loss=False` or `assistant_only_loss=True` it is left to do so.
    """
    if formatting_func:  # makes the text column itself
        check_max_length(args.max_length)
    else:
        check_rows(dataset, tokenizer, args)
    columns = list(dataset.column_names or next(iter(dataset)))
    kind = "text" if formatting_func else dataset_kind(columns, args.dataset_text_field)
    if kind != "messages" or args.completion_only_loss is False or args.assistant_only_loss:
        return dataset
    options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    with args.main_process_first(desc="tokenizing conversations"):
        turns = supervise_turns(dataset, tokenizer, **options)
    if isinstance(turns, Dataset):
        _check_supervised(turns, "tokens", tokenizer, args)
    return turns


def check_rows(dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> None:
    """
    Raise unless a trainer will have something to learn. Of a stream nothing is read.

    Raises:
        ValueError: the dataset has no rows, no known columns, something else than text in them, or no row with a
            supervised token within `max_length`, or that is below 2.
    """
    check_max_length(args.max_length)
    if not isinstance(dataset, Dataset):
        return
    if not len(dataset):
        raise ValueError(NO_ROWS)
    kind = dataset_kind(list(dataset.column_names), args.dataset_text_field)
    _check_texts(dataset, kind, args.dataset_text_field)
    _check_supervised(dataset, kind, tokenizer, args)


def check_max_length(max_length: int | None) -> None:
    """Raise a `ValueError` where rows would be too short for a token and the one that follows it."""
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"max_length={max_length} must be at least 2, a token and the one that follows it: raise max_length."
        )


def _check_texts(dataset: Dataset, kind: str, text_field: str) -> None:
    for column in {"text": [text_field], "answers": ["prompt", "completion"]}.get(kind, []):
        feature = dataset.features[column]
        if isinstance(feature, Value) and feature.dtype not in ("string", "large_string"):
            raise ValueError(
                f"Column {column!r} of the dataset holds {dataset[0][column]!r} in row 0, which is not text: write "
                "text there" + (", or set dataset_text_field to another column." if kind == "text" else ".")
            )


def _check_supervised(dataset: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> None:
    """Raise a `ValueError` where `SFTTrainer` would drop every row, as nothing supervised is left in it."""
    limit = args.max_length
    if limit is None or args.packing or dataset.format["type"] == "custom":
        return
    start = args.truncation_mode == "keep_start"
    # The first row with something to learn ends the search: usually the first of all.
    if kind == "tokens" and "labels" in dataset.column_names:
        part = slice(None, limit) if start else slice(-limit, None)
        kept = any(any(label != IGNORED for label in labels[part]) for labels in dataset["labels"])
    elif kind == "answers" and start and args.completion_only_loss is not False:
        kept = any(_reaches_answer(row, limit, tokenizer) for row in dataset.select_columns(["prompt", "completion"]))
    else:
        return
    if not kept:
        raise ValueError(
            f"No row of the dataset keeps a supervised token within max_length={limit}: raise max_length"
            + (', or set truncation_mode="keep_end".' if start else ".")
        )


def _reaches_answer(row: dict[str, Any], limit: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the first `limit` tokens of prompt and answer differ from those of the prompt alone."""

    def tokens(text: Any, **options: Any) -> list[int]:
        if isinstance(text, str):
            return list(tokenizer(text)["input_ids"])
        encoded: Any = tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **options)
        return list(encoded["input_ids"])

    prompt = tokens(row["prompt"], add_generation_prompt=True)
    return len(prompt) < limit or prompt[:limit] != tokens(row["prompt"] + row["completion"])[:limit]


def prepare_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    formatting_func: Callable[[dict], str] | None = None,
    name: str = "train",
) -> Dataset | IterableDataset:
    """
    The rows that [`StepwiseDistillationTrainer`] trains on, made without a trainer.

    Args:
        dataset (`Dataset` or `IterableDataset`): `text`, `prompt` and `completion`, `messages`, or `input_ids` with
            `labels`.
        tokenizer (`PreTrainedTokenizerBase`): the student's.
        args (`SFTConfig`): the trainer's options. Those that matter here: `max_length`, `truncation_mode`, `packing`,
            `packing_strategy`, `completion_only_loss`, `assistant_only_loss`, `dataset_text_field`, `eos_token`,
            `chat_template_path` (a file), `shuffle_dataset` with `seed`, `dataset_num_proc` and `dataset_kwargs`.
        formatting_func (`Callable`, *optional*): as in `SFTTrainer`.
        name (`str`, *optional*, defaults to `"train"`): for the progress bars.

    Returns:
        `Dataset` or `IterableDataset`: with `input_ids` and `labels`, and `seq_lengths` where rows are packed whole.

    Raises:
        ValueError: the dataset has no rows, none of these columns, something else than text in them, or no row with
            a supervised token within `max_length`; or an option does not suit it.
    """
    options: Any = args.dataset_kwargs or {}
    if options.get("skip_prepare_dataset", False):
        return dataset
    sample: Any = next(iter(dataset), None)
    if sample is None:
        raise ValueError(NO_ROWS)
    tokenizer = with_options(tokenizer, args)
    rows = supervise_conversations(dataset, tokenizer, args, formatting_func)
    only = args.completion_only_loss
    # What SFTTrainer.__init__ leaves on the trainer for its _prepare_dataset, which uses nothing else of it.
    trainer: Any = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=_training_template(tokenizer) if args.assistant_only_loss else None,
        completion_only_loss={"prompt", "completion"} <= set(sample) if only is None else only,
    )
    return SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, args.packing, formatting_func, name)


def with_options(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> PreTrainedTokenizerBase:
    """
    The student's tokenizer with `eos_token` and `chat_template_path`, which `SFTTrainer` gives it later; a copy if
    there is one of them.

    Raises:
        ValueError: the tokenizer does not have that token, or the template is not in a file.
    """
    if args.eos_token is None and args.chat_template_path is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ValueError(
                f"eos_token={args.eos_token!r} is no token of the student's tokenizer ({len(tokenizer)} tokens): "
                "choose one that it has."
            )
        tokenizer.eos_token = args.eos_token
    if args.chat_template_path is not None:
        path = Path(args.chat_template_path)
        if path.suffix not in (".jinja", ".j2") or not path.is_file():
            raise ValueError(
                f"chat_template_path={args.chat_template_path!r} must be a .jinja or .j2 file. A template cloned from "
                "another model adds tokens to the student; save student and tokenizer with it first, and leave the "
                "option out."
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template with `{% generation %}` markers where the tokenizer's own has none."""
    template: Any = tokenizer.chat_template
    own: str = template.get("default", "") if isinstance(template, dict) else template or ""
    return None if re.search(r"\{%-?\s*generation\s*-?%\}", own) else get_training_chat_template(tokenizer)


__all__ = ["check_max_length", "check_rows", "prepare_rows", "supervise_conversations", "with_options"]
