"""Loading the models, and checking the teacher's vocabulary."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from cbd_hf.distillation.cache import TeacherCache
from cbd_hf.tokenization.limits import needed_rows, warn_of_surplus_tokens


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cbd_hf.distillation.config import StepwiseDistillationConfig


logger = logging.getLogger(__name__)

# Of a model's init_kwargs, those that say where its files are.
_WHERE = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def load_model(
    name_or_path: str, init_kwargs: Any, trust_remote_code: bool, dtype: torch.dtype | str
) -> PreTrainedModel:
    """
    `AutoModelForCausalLM.from_pretrained` with `model_init_kwargs` or `teacher_model_init_kwargs`, whose `dtype` may
    be a name; `dtype` if they have none.
    """
    kwargs = {"dtype": dtype} | dict(init_kwargs or {})
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    return AutoModelForCausalLM.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **kwargs)


def load_tokenizer(name_or_path: str, init_kwargs: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint that [`load_model`] loads with the same options: in its `subfolder`, or else above.
    """
    options = _hub_options(init_kwargs)
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError):
        if not options.pop("subfolder", ""):
            raise
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **options)


def find_tokenizer(
    name_or_path: str | None, init_kwargs: Any = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer saved with a teacher; `None`, with a warning, if there is none or no checkpoint is named.

    Args as in [`load_tokenizer`].
    """
    why = "it was not given, and the teacher does not say where it was loaded from"
    if name_or_path:
        folder = Path(name_or_path)
        places = {folder, folder / (_hub_options(init_kwargs).get("subfolder") or "")}
        why = f"there is none in {name_or_path}"
        if not folder.is_dir() or any((place / "tokenizer_config.json").is_file() for place in places):
            try:
                return load_tokenizer(name_or_path, init_kwargs, trust_remote_code)
            except (OSError, ValueError) as error:
                why = f"it could not be loaded from {name_or_path} ({error})"
    logger.warning(
        f"The teacher's tokenizer is not compared with the student's, only the number of tokens: {why}. Give it as "
        "teacher_processing_class."
    )
    return None


def check_same_vocabulary(
    student: PreTrainedModel,
    teacher: PreTrainedModel | int,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """
    Raise unless both models read and write the same tokens. Numbers of padding rows behind them may differ.

    `teacher` may be the number of tokens that a cache has predictions for; a student cannot have fewer rows.

    Raises:
        ValueError: another tokenizer, or one of the models has fewer rows than the tokenizer has tokens; added ones
            besides bos, eos, pad and unk may be missing, with a warning.
    """
    vocabulary = tokenizer.get_vocab()
    if teacher_tokenizer is not None and teacher_tokenizer.get_vocab() != vocabulary:
        raise ValueError(
            f"The teacher's tokenizer ({len(teacher_tokenizer)} tokens) is not the student's ({len(tokenizer)} "
            "tokens). Stepwise distillation compares the two next-token distributions token by token and needs one "
            "vocabulary; reach a source with another one by bridge distillation."
        )
    for role, model in (("student", student), ("teacher", teacher)):
        rows = model if isinstance(model, int) else model.config.get_text_config().vocab_size
        if rows < needed_rows(tokenizer):
            raise ValueError(
                f"The {role} has vocab_size {rows} but the tokenizer has {len(vocabulary)} tokens, so they do not "
                "belong together. Give the tokenizer that the models were trained with as processing_class."
            )
        warn_of_surplus_tokens(role, tokenizer, rows)
    own = student.config.get_text_config().vocab_size
    if isinstance(teacher, int) and teacher > own:
        raise ValueError(
            f"The cached teacher predicts {teacher} tokens, but the student has {own}: build the cache with "
            f"vocab_size={own}."
        )


def config_of(teacher: PreTrainedModel | str | None, args: StepwiseDistillationConfig) -> PretrainedConfig | None:
    """Of a teacher that will run."""
    if args.teacher_cache or teacher is None:
        return None
    return load_config(teacher, args.teacher_model_init_kwargs, args.trust_remote_code)


def load_config(model: PreTrainedModel | str, init_kwargs: Any, trust_remote_code: bool) -> PretrainedConfig:
    """A model's config, or that of a checkpoint that [`load_model`] loads with the same options."""
    if not isinstance(model, str):
        return model.config
    kwargs = dict(init_kwargs or {})
    if isinstance(kwargs.get("config"), PretrainedConfig):
        return kwargs["config"]
    return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, **_hub_options(kwargs))


def _hub_options(init_kwargs: Any) -> dict[str, Any]:
    kwargs = dict(init_kwargs or {})
    return {name: kwargs[name] for name in _WHERE if name in kwargs}


def open_cache(
    args: StepwiseDistillationConfig, tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel | str | None
) -> TeacherCache | None:
    """The cache that the options name, if it suits them; and a teacher's directory, if one is given as well."""
    if not args.teacher_cache:
        return None
    cache = TeacherCache.from_pretrained(args.teacher_cache)
    directory = teacher if isinstance(teacher, str) and Path(teacher).is_dir() else None
    cache.check(tokenizer=tokenizer, temperature=args.temperature, objective=args.objective, teacher=directory)
    return cache


__all__ = [
    "check_same_vocabulary",
    "config_of",
    "find_tokenizer",
    "load_config",
    "load_model",
    "load_tokenizer",
    "open_cache",
]
