"""The live teacher: loading it and checking its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_teacher(
    name_or_path: str, init_kwargs: Any, trust_remote_code: bool, dtype: torch.dtype | str
) -> PreTrainedModel:
    """
    `AutoModelForCausalLM.from_pretrained` with `teacher_model_init_kwargs`, whose `dtype` may be a name; `dtype` if
    they have none.
    """
    kwargs = {"dtype": dtype} | dict(init_kwargs or {})
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    return AutoModelForCausalLM.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **kwargs)


def find_tokenizer(name_or_path: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a checkpoint; `None` if there is none or no checkpoint is named."""
    if not name_or_path:
        return None
    if Path(name_or_path).is_dir() and not (Path(name_or_path) / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError):
        return None


def check_same_vocabulary(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """
    Raise unless both models read and write the same tokens. Numbers of padding rows behind them may differ.

    Raises:
        ValueError: another tokenizer, or one of the models has fewer rows than the tokenizer has tokens.
    """
    vocabulary = tokenizer.get_vocab()
    if teacher_tokenizer is not None and teacher_tokenizer.get_vocab() != vocabulary:
        raise ValueError(
            f"The teacher's tokenizer ({len(teacher_tokenizer)} tokens) is not the student's ({len(tokenizer)} "
            "tokens). Stepwise distillation compares the two next-token distributions token by token and needs one "
            "vocabulary; reach a source with another one by bridge distillation."
        )
    for role, model in (("student", student), ("teacher", teacher)):
        rows = model.config.get_text_config().vocab_size
        if rows <= max(vocabulary.values()):
            raise ValueError(
                f"The {role} has vocab_size {rows} but the tokenizer has {len(vocabulary)} tokens, so they do not "
                "belong together. Give the tokenizer that the models were trained with as processing_class."
            )


__all__ = ["check_same_vocabulary", "find_tokenizer", "load_teacher"]
