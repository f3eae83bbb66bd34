"""Names and kinds of a dataset's columns."""

from __future__ import annotations


IGNORED = -100  # the label of a token that nothing is learnt from
EXAMPLE_ID = "example_id"  # which row of the dataset it is
SOURCE_PROMPTS = ("same", "chat")  # how a source reads a prompt: as it is, or through its chat template


def dataset_kind(columns: list[str], text_field: str = "text") -> str:
    """
    `"tokens"`, `"answers"`, `"messages"` or `"text"`, by the columns of a dataset.

    Raises:
        ValueError: none of the accepted sets of columns is there.
    """
    if "input_ids" in columns:
        return "tokens"
    if {"prompt", "completion"} <= set(columns):
        return "answers"
    if "messages" in columns:
        return "messages"
    if text_field in columns:
        return "text"
    raise ValueError(
        f"The dataset has the columns {sorted(columns)}; distillation needs one of: {text_field!r} (plain text; "
        "dataset_text_field names another column), 'prompt' and 'completion', 'messages', or 'input_ids' (with "
        "'labels'). Rename or map the columns first."
    )


__all__ = ["EXAMPLE_ID", "IGNORED", "SOURCE_PROMPTS", "dataset_kind"]
