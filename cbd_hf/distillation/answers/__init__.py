"""A source's answers to prompts on disk: the data of sequence-level distillation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from cbd_hf.distillation.answers.build import AnswersReport, build_answers
    from cbd_hf.distillation.answers.filters import AnswerFilters, filter_answers
    from cbd_hf.distillation.answers.manifest import AnswersManifest, AnswersSettings
    from cbd_hf.distillation.answers.reader import load_answers

# Imported when first used: reading needs far less than generating.
_MODULES = {
    "AnswerFilters": "filters",
    "AnswersManifest": "manifest",
    "AnswersReport": "build",
    "AnswersSettings": "manifest",
    "build_answers": "build",
    "filter_answers": "filters",
    "load_answers": "reader",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = [
    "AnswerFilters",
    "AnswersManifest",
    "AnswersReport",
    "AnswersSettings",
    "build_answers",
    "filter_answers",
    "load_answers",
]
