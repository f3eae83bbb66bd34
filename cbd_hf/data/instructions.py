"""Instruction data in the Dolly, Alpaca and self-instruct layouts as prompt and completion."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from .prompts import COMPLETION_COLUMN, PROMPT_COLUMN, REFERENCES_COLUMN, alpaca_prompt
from .sources import load_split
from .text import split_rows


if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

DOLLY = "databricks/databricks-dolly-15k"
_CATEGORY = "category"
# Input column and answer column beside `instruction`; the first pair whose answer column exists is taken.
_LAYOUTS = (("context", "response"), ("input", "output"), ("input", "response"), ("input", "instances"))


def load_instructions(
    path_or_repo: str | os.PathLike[str] = DOLLY, *, split: str = "train", max_examples: int | None = None
) -> Dataset:
    """
    Load instruction data and write its prompts in the wording of the published protocol.

    Args:
        path_or_repo (`str` or `Path`, *optional*, defaults to `"databricks/databricks-dolly-15k"`): a Hub id, or a
            local `.jsonl`, `.json` or `.parquet` file (also compressed: `.gz`, `.xz`) or directory. Its columns may be
            `instruction, context, response` (Dolly), `instruction, input, output` (Alpaca), `instruction, instances`
            (self-instruct) or `prompt, completion` (taken as they are).
        split (`str`, *optional*, defaults to `"train"`): split of a Hub data set or of a saved `DatasetDict`.
        max_examples (`int`, *optional*): keep the first rows of the source only.

    Returns:
        `Dataset`: columns `prompt` and `completion`; `category` where the source has it; `references`
        (`list[str]`, all accepted answers, the completion first) where the source allows several answers.

    Raises:
        ValueError: the columns of the source fit none of these layouts, or no example has an answer.
    """
    from datasets import Dataset

    raw = load_split(path_or_repo, split=split, max_rows=max_examples)
    columns = raw.column_names
    answer = _answer_column(columns, path_or_repo)
    several = answer in raw.features and _holds_lists(raw, answer)
    rows = [example for row in raw for example in _examples(row, answer)]
    kept = [row for row in rows if row[COMPLETION_COLUMN]]
    if len(kept) < len(rows):
        logger.warning("Dropped %d of %d examples of %s: no answer.", len(rows) - len(kept), len(rows), path_or_repo)
    if not kept:
        raise ValueError(f"No example of {path_or_repo} has an answer in column {answer!r}.")
    names = [PROMPT_COLUMN, COMPLETION_COLUMN]
    names += [REFERENCES_COLUMN] if several else []
    names += [_CATEGORY] if _CATEGORY in columns else []
    return Dataset.from_dict({name: [row[name] for row in kept] for name in names})


def _answer_column(columns: list[str], source: Any) -> str:
    if {PROMPT_COLUMN, COMPLETION_COLUMN} <= set(columns):
        return COMPLETION_COLUMN
    if "instruction" in columns:
        for _, answer in _LAYOUTS:
            if answer in columns:
                return answer
    raise ValueError(
        f"{source} has the columns {', '.join(columns)}; needed are instruction and response (optionally context), "
        "instruction and output (optionally input), instruction and instances, or prompt and completion."
    )


def _holds_lists(dataset: Dataset, answer: str) -> bool:
    first = dataset[0][answer] if len(dataset) else None
    # A conversation is a list of messages; a list of strings or of instances holds several answers.
    return isinstance(first, list) and not (first and isinstance(first[0], dict) and "role" in first[0])


def _examples(row: dict[str, Any], answer: str) -> Iterator[dict[str, Any]]:
    """The examples of one source row: one, or one for each distinct input of its instances."""
    if answer == "instances":
        by_input: dict[str, list[str]] = {}
        for instance in row[answer] or []:
            by_input.setdefault(instance.get("input") or "", []).append(instance["output"])
        pairs: list[tuple[Any, Any]] = list(by_input.items())
    else:
        given = next((row[name] for name, _ in _LAYOUTS if row.get(name)), "")
        pairs = [(given, row[answer])]
    for given, answers in pairs:
        prompt = row[PROMPT_COLUMN] if answer == COMPLETION_COLUMN else alpaca_prompt(row["instruction"], given)
        example: dict[str, Any] = {PROMPT_COLUMN: prompt, COMPLETION_COLUMN: answers, _CATEGORY: row.get(_CATEGORY)}
        if isinstance(answers, str):
            example[COMPLETION_COLUMN] = answers if answers.strip() else ""
        elif answers and isinstance(answers[0], str):
            references = [text for text in answers if text.strip()]
            example |= {COMPLETION_COLUMN: references[0] if references else "", REFERENCES_COLUMN: references}
        yield example


def drop_long_prompts(dataset: Dataset, limit: int, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """
    Keep the examples whose prompt has at most `limit` tokens.

    Args:
        dataset (`Dataset`): from [`load_instructions`].
        limit (`int`): longest prompt in tokens; the published protocol trains with 256.
        tokenizer (`PreTrainedTokenizerBase`): counts the tokens.

    Raises:
        ValueError: no example is left.
    """
    lengths = [len(tokens) for tokens in tokenizer(dataset[PROMPT_COLUMN][:], verbose=False)["input_ids"]]
    kept = [row for row, length in enumerate(lengths) if length <= limit]
    if not kept:
        raise ValueError(f"Every prompt is longer than {limit} tokens; the shortest has {min(lengths)}.")
    if len(kept) < len(lengths):
        logger.info("Kept %d of %d examples with prompts of at most %d tokens.", len(kept), len(lengths), limit)
    return dataset.select(kept)


def split_instructions(dataset: Dataset, eval_size: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    Divide instruction data into a training and an evaluation part that share no prompt.

    Args:
        dataset (`Dataset`): from [`load_instructions`].
        eval_size (`int`): number of examples to evaluate on.
        seed (`int`, *optional*, defaults to `0`): decides which ones.

    Returns:
        `tuple[Dataset, Dataset]`: training and evaluation examples, both in their original order.

    Raises:
        ValueError: `eval_size` outside 1 ... len(dataset) - 1.
    """
    keys = [[str(prompt)] for prompt in dataset[PROMPT_COLUMN]]
    train, evaluation = split_rows(keys, eval_size, seed)
    return dataset.select(train), dataset.select(evaluation)


__all__ = ["DOLLY", "drop_long_prompts", "load_instructions", "split_instructions"]
