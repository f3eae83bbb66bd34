"""The data of a chain build: training rows, held-out texts, calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cbd_hf._files import canonical_digest
from cbd_hf.data.instructions import load_instructions
from cbd_hf.data.sources import load_split
from cbd_hf.data.text import load_texts, split_rows, train_valid_split
from cbd_hf.distillation.columns import dataset_kind
from cbd_hf.distillation.recipe import BuildArguments


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CALIBRATION_LENGTH = 256
_DIGEST_ROWS = 1000


@dataclass(frozen=True)
class BuildData:
    """
    Args:
        train (`Dataset`): rows for the trainers.
        held_out (`list[str]`): texts that no stage trains on.
        digest (`str`): of the training rows (their number, and the first and last 1,000).
        calibration_texts (`list[str]`): training texts on which layers and channels are scored.
    """

    train: Dataset
    held_out: list[str]
    digest: str
    calibration_texts: list[str]

    def calibration(self, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
        """Token ids, int64, shape (1, up to 256), one tensor per calibration text of at least two tokens."""
        rows = [
            tokenizer(text, return_tensors="pt").input_ids[:, :_CALIBRATION_LENGTH] for text in self.calibration_texts
        ]
        return [row.long() for row in rows if row.shape[1] > 1]


def load_build_data(args: BuildArguments, text_field: str, seed: int) -> BuildData:
    """
    Load and split the recipe's dataset.

    Raises:
        ValueError: missing columns, or too few rows for the documents to hold out.
    """
    limit = args.max_documents
    if args.data_format == "text":
        rows = load_texts(args.dataset, split=args.dataset_split, text_field=text_field, max_documents=limit)
        rows = rows.select_columns([name for name in rows.column_names if name in ("text", "title")])
        train, held_out = train_valid_split(rows, args.eval_documents, seed) if args.eval_documents else (rows, None)
        train = train.select_columns(["text"])
    else:
        if args.data_format == "instructions":
            rows = load_instructions(args.dataset, split=args.dataset_split, max_examples=limit)
            rows = rows.select_columns(["prompt", "completion"])
        else:
            rows = load_split(args.dataset, split=args.dataset_split, max_rows=limit)
            if dataset_kind(rows.column_names, text_field) == "tokens":
                raise ValueError(
                    "A chain build measures text, but the dataset is tokenized ('input_ids'): give 'text', 'prompt' "
                    "and 'completion', or 'messages'."
                )
        train, held_out = rows, None
        if args.eval_documents:
            kept, out = split_rows([[_as_text(row, text_field)] for row in rows], args.eval_documents, seed)
            train, held_out = rows.select(kept), rows.select(out)
    if args.data_format == "text" and text_field != "text":
        train = train.rename_column("text", text_field)  # the trainer's name for it
    first = min(len(train), args.calibration_documents)
    ends = [*range(min(_DIGEST_ROWS, len(train))), *range(max(0, len(train) - _DIGEST_ROWS), len(train))]
    return BuildData(
        train=train,
        held_out=[_as_text(row, text_field) for row in held_out or []],
        digest=canonical_digest([len(train), [train[index] for index in ends]]),
        calibration_texts=[_as_text(train[index], text_field) for index in range(first)],
    )


def _as_text(row: dict[str, Any], text_field: str) -> str:
    if "prompt" in row:
        return _joined(row["prompt"]) + _joined(row["completion"])
    if "messages" in row:
        return _joined(row["messages"])
    return row.get(text_field) or row["text"]


def _joined(part: str | list[dict[str, str]]) -> str:
    return part if isinstance(part, str) else "\n".join(message["content"] for message in part)


__all__ = ["BuildData", "load_build_data"]
