"""The data of a chain build: training rows, held-out texts, calibration tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cbd_hf.data.columns import dataset_kind
from cbd_hf.data.instructions import load_instructions
from cbd_hf.data.sources import load_split
from cbd_hf.data.text import load_texts, split_rows, train_valid_split
from cbd_hf.distillation.recipe import BuildArguments


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CALIBRATION_LENGTH = 256
_DIGEST_ROWS = 1024


@dataclass(frozen=True)
class BuildData:
    """
    Args:
        train (`Dataset`): rows for the trainers.
        held_out (`list[str]`): texts that no stage trains on.
        digest (`str`): of all training rows, in their order; see [`rows_digest`].
        calibration_texts (`list[str]`): training texts on which layers and channels are scored.
    """

    train: Dataset
    held_out: list[str]
    digest: str
    calibration_texts: list[str]

    def calibration(self, tokenizer: PreTrainedTokenizerBase, positions: int | None = None) -> list[torch.Tensor]:
        """
        Token ids, int64, shape (1, up to 256 or `positions`), one tensor per calibration text of at least two tokens.
        """
        longest = min(_CALIBRATION_LENGTH, positions or _CALIBRATION_LENGTH)
        rows = [tokenizer(text, return_tensors="pt").input_ids[:, :longest] for text in self.calibration_texts]
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
    return BuildData(
        train=train,
        held_out=[_as_text(row, text_field) for row in held_out or []],
        digest=rows_digest(train),
        calibration_texts=[_as_text(train[index], text_field) for index in range(first)],
    )


def rows_digest(dataset: Dataset) -> str:
    """
    Hexadecimal SHA-256 of a dataset's content: its columns by name, all rows, their order.

    It does not depend on how the rows are stored (files, shards, memory, selected out of others). About a second for
    half a gigabyte of text; a progress bar is shown after three seconds.

    Args:
        dataset (`Dataset`): any columns.
    """
    from tqdm import tqdm

    names = sorted(dataset.column_names)
    digest = hashlib.sha256(repr((len(dataset), names)).encode())
    batches = dataset.with_format("arrow").iter(batch_size=_DIGEST_ROWS)
    total = -(-len(dataset) // _DIGEST_ROWS)
    for table in tqdm(batches, total=total, desc="digest of the data", unit="batch", delay=3, disable=None):
        for name in names:
            _update(digest, table.column(name).combine_chunks())
    return digest.hexdigest()


def _update(digest: Any, array: Any) -> None:
    """Add an Arrow array's values to a digest, whatever its offset, chunks and width of offsets are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    kind = array.type
    digest.update(f"{str(kind).replace('large_', '')} {len(array)} {array.null_count};".encode())
    if array.null_count:
        digest.update(array.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        array = array.cast(pa.large_string())
        array = array.fill_null("") if array.null_count else array
        digest.update(pc.binary_length(array).to_numpy(zero_copy_only=False).tobytes())
        _, offsets, values = array.buffers()
        if values is not None:
            ends = pa.Array.from_buffers(pa.int64(), len(array) + 1, [None, offsets], offset=array.offset)
            digest.update(memoryview(values)[ends[0].as_py() : ends[len(array)].as_py()])
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.list_value_length(array)
        lengths = lengths.fill_null(0) if array.null_count else lengths
        digest.update(lengths.cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_struct(kind):
        for position, child in enumerate(array.flatten()):
            digest.update(kind.field(position).name.encode())
            _update(digest, child)
    elif (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and not array.null_count:
        digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(repr(array.to_pylist()).encode())


def _as_text(row: dict[str, Any], text_field: str) -> str:
    if "prompt" in row:
        return _joined(row["prompt"]) + _joined(row["completion"])
    if "messages" in row:
        return _joined(row["messages"])
    return row.get(text_field) or row["text"]


def _joined(part: str | list[dict[str, str]]) -> str:
    return part if isinstance(part, str) else "\n".join(message["content"] for message in part)


__all__ = ["BuildData", "load_build_data", "rows_digest"]
