"""Answers as training data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cbd_hf.data.sources import load_split
from cbd_hf.distillation.answers.filters import AnswerFilters, filter_answers
from cbd_hf.distillation.answers.manifest import AnswersManifest


if TYPE_CHECKING:
    from datasets import Dataset


def load_answers(
    directory: str | os.PathLike[str], filters: AnswerFilters | None = None, *, verify: str = "size"
) -> tuple[Dataset, dict[str, int]]:
    """
    The answers that a bridge is trained on. The files stay as they are.

    Args:
        directory (`str` or `Path`): the `output_dir` of `cbd bridge generate`.
        filters ([`AnswerFilters`], *optional*): which answers to leave out; by default none.
        verify (`str`, *optional*, defaults to `"size"`): check the files' sizes, `"full"` (their sha256) or `"none"`.

    Returns:
        `tuple[Dataset, dict[str, int]]`: columns `prompt` and `completion`; option -> answers that it has dropped.

    Raises:
        FileNotFoundError: the directory holds no answers.
        ValueError: they are not complete or a file is broken, or see [`filter_answers`].
    """
    path = Path(directory)
    manifest = AnswersManifest.read(path)
    if not manifest.complete:
        raise ValueError(
            f"{directory} has answers to {manifest.prompts} of {manifest.data.asked} prompts. Run the same "
            "`cbd bridge generate` again to finish it."
        )
    manifest.check_shards(path, verify)
    kept, dropped = filter_answers(load_split(path), filters or AnswerFilters())
    return kept.select_columns(["prompt", "completion"]), dropped


__all__ = ["load_answers"]
