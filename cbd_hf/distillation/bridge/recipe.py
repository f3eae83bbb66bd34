"""The `bridge` of a chain's recipe: checked before any work."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from cbd_hf.distillation.answers.filters import AnswerFilters
from cbd_hf.distillation.answers.manifest import AnswersSettings
from cbd_hf.distillation.bridge.config import SEQUENCE, BridgeDistillationConfig
from cbd_hf.distillation.bridge.source_cache import SourceCache
from cbd_hf.distillation.cache.manifest import DTYPES
from cbd_hf.distillation.cache.reader import TeacherCache
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.options import typed_options


BRIDGE_OPTIONS = {"answers", "checkpoint", "filters", "method", "name", "supervised", "training"}
# Options of `answers` that say how the source runs, not what it answers.
ANSWERS_RUN_ONLY = ("batch_size", "model_init_kwargs")
_DEFAULT_NAME = "bridge"
# Options of the stepwise trainer that mean something else for a bridge, or nothing.
_NOT_INHERITED = ("cross_entropy_weight", "lmbda", "objective", "packing", "padding_free", "teacher_cache")


def check_bridge(bridge: Mapping[str, Any], training: StepwiseDistillationConfig, data_format: str) -> str:
    """
    Raise a `ValueError` for what is wrong with a recipe's `bridge`.

    Args:
        bridge (`Mapping`): the recipe's.
        training ([`StepwiseDistillationConfig`]): the recipe's options of every stage.
        data_format (`str`): the recipe's.

    Returns:
        `str`: the anchor's name.
    """
    unknown = set(bridge) - BRIDGE_OPTIONS
    if unknown:
        raise ValueError(f"`bridge` has unknown options {sorted(unknown)}; known: {sorted(BRIDGE_OPTIONS)}.")
    if not bridge.get("checkpoint"):
        raise ValueError("`bridge` needs a checkpoint: a model of the chain's own family, such as gpt2-xl.")
    typed_options(SFTConfig, bridge.get("supervised"), "bridge: supervised")
    if "method" in (bridge.get("training") or {}):
        raise ValueError("`bridge: training` has 'method': write it beside `training`, in `bridge`.")
    if bridge_method(bridge) == SEQUENCE:
        if data_format == "text":
            raise ValueError(
                "`bridge` with method: sequence needs prompts that the source can answer: set data_format to "
                "instructions or columns."
            )
        typed_options(SFTConfig, bridge.get("training"), "bridge: training")
        answers_settings(bridge)
        answers_run(bridge)
        answer_filters(bridge)
    else:
        for name in ("answers", "filters"):
            if name in bridge:
                raise ValueError(f"`bridge` has {name}, which only method: sequence uses; leave it out.")
        config = bridge_training(training, bridge, "unused")
        if config.method == "mined" and importlib.util.find_spec("rapidfuzz") is None:
            raise ValueError("method: mined needs rapidfuzz. Run: pip install rapidfuzz, or choose another method.")
        _check_cache(config, bridge)
    return bridge_name(bridge)


def _check_cache(config: BridgeDistillationConfig, bridge: Mapping[str, Any]) -> None:
    if not config.teacher_cache:
        return
    if bridge.get("supervised"):
        raise ValueError(
            f"teacher_cache={config.teacher_cache!r} has the predictions of the source as it is, but `bridge: "
            "supervised` trains the source first: leave one of them out."
        )
    cache = SourceCache(TeacherCache.from_pretrained(config.teacher_cache)).cache
    cache.check(temperature=config.temperature, objective=config.objective, hidden=config.hidden_loss_weight > 0)


def bridge_name(bridge: Mapping[str, Any]) -> str:
    """The anchor's name; by default "bridge"."""
    return bridge.get("name", _DEFAULT_NAME)


def bridge_method(bridge: Mapping[str, Any]) -> str:
    """How it learns; by default as [`BridgeDistillationConfig`] says."""
    default = {entry.name: entry.default for entry in dataclasses.fields(BridgeDistillationConfig)}["method"]
    return str(bridge.get("method", default))


def answers_settings(bridge: Mapping[str, Any]) -> AnswersSettings:
    """How the source's answers are drawn."""
    names = {entry.name for entry in dataclasses.fields(AnswersRun)}
    given = {name: value for name, value in (bridge.get("answers") or {}).items() if name not in names}
    return AnswersSettings(**typed_options(AnswersSettings, given, "bridge: answers"))


@dataclass(frozen=True)
class AnswersRun:
    """
    How the source runs while it answers.

    Args:
        dtype (`str`, *optional*): of its weights; `"auto"` is as stored. By default bfloat16 for a source that
            `supervised` has trained, which is stored in float32, on an accelerator, and else as stored.
        batch_size (`int`, *optional*, defaults to 16): answers at once.
        model_init_kwargs (`dict`, *optional*): for its `from_pretrained`, such as `device_map`, or for `vllm.LLM`.

    Raises:
        ValueError: one of them is out of its range.
    """

    dtype: str | None = None
    batch_size: int = 16
    model_init_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "auto", *DTYPES):
            raise ValueError(f"`bridge: answers`: dtype={self.dtype!r} is unknown; choose auto or one of {DTYPES}.")
        if self.batch_size < 1:
            raise ValueError(f"`bridge: answers`: batch_size={self.batch_size} must be at least 1.")
        if not isinstance(self.model_init_kwargs, dict | None):
            raise ValueError(f"`bridge: answers`: model_init_kwargs={self.model_init_kwargs!r} must be a mapping.")

    def options(self, tuned: bool) -> dict[str, Any]:
        """For [`~cbd_hf.distillation.answers.build_answers`]; `tuned`: whether `supervised` has trained the source."""
        default = "bfloat16" if tuned and torch.accelerator.is_available() else "auto"
        return dataclasses.asdict(self) | {"dtype": self.dtype or default}


def answers_run(bridge: Mapping[str, Any]) -> AnswersRun:
    """How the source runs while it answers."""
    names = {entry.name for entry in dataclasses.fields(AnswersRun)}
    given = {name: value for name, value in (bridge.get("answers") or {}).items() if name in names}
    return AnswersRun(**typed_options(AnswersRun, given, "bridge: answers"))


def answer_filters(bridge: Mapping[str, Any]) -> AnswerFilters:
    """Which of them are left out."""
    return AnswerFilters(**typed_options(AnswerFilters, bridge.get("filters"), "bridge: filters"))


def bridge_training(
    base: StepwiseDistillationConfig, bridge: Mapping[str, Any], output_dir: str | Path
) -> BridgeDistillationConfig:
    """
    The options of the bridge's trainer: those of the recipe, then those of `bridge`.

    Raises:
        ValueError: an option is unknown or out of its range.
    """
    config = object.__new__(BridgeDistillationConfig)
    config.__dict__.update(copy.copy(base).__dict__)
    for entry in dataclasses.fields(BridgeDistillationConfig):
        if entry.name not in base.__dict__ or entry.name in _NOT_INHERITED:
            setattr(config, entry.name, entry.default)
    options = typed_options(BridgeDistillationConfig, bridge.get("training"), "bridge: training")
    for name, value in options.items():
        setattr(config, name, value)
    if "method" in bridge:
        config.method = bridge["method"]
    config.output_dir = str(output_dir)
    config.save_total_limit = config.save_total_limit or 2
    config.include_num_input_tokens_seen = "non_padding"
    config.check()
    return config


__all__ = [
    "ANSWERS_RUN_ONLY",
    "BRIDGE_OPTIONS",
    "AnswersRun",
    "answer_filters",
    "answers_run",
    "answers_settings",
    "bridge_method",
    "bridge_name",
    "bridge_training",
    "check_bridge",
]
