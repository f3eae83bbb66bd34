"""The `bridge` of a chain's recipe: checked before any work."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import SFTConfig

from cbd_hf.distillation.answers.filters import AnswerFilters
from cbd_hf.distillation.answers.manifest import AnswersSettings
from cbd_hf.distillation.bridge.config import SEQUENCE, BridgeDistillationConfig
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.options import typed_options


BRIDGE_OPTIONS = {"answers", "checkpoint", "filters", "method", "name", "supervised", "training"}
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
    if bridge_method(bridge) == SEQUENCE:
        if data_format == "text":
            raise ValueError(
                "`bridge` with method: sequence needs prompts that the source can answer: set data_format to "
                "instructions or columns."
            )
        typed_options(SFTConfig, bridge.get("training"), "bridge: training")
        answers_settings(bridge)
        answer_filters(bridge)
    else:
        for name in ("answers", "filters"):
            if name in bridge:
                raise ValueError(f"`bridge` has {name}, which only method: sequence uses; leave it out.")
        bridge_training(training, bridge, "unused")
    return bridge_name(bridge)


def bridge_name(bridge: Mapping[str, Any]) -> str:
    """The anchor's name; by default "bridge"."""
    return bridge.get("name", _DEFAULT_NAME)


def bridge_method(bridge: Mapping[str, Any]) -> str:
    """How it learns; by default as [`BridgeDistillationConfig`] says."""
    default = {entry.name: entry.default for entry in dataclasses.fields(BridgeDistillationConfig)}["method"]
    return str(bridge.get("method", default))


def answers_settings(bridge: Mapping[str, Any]) -> AnswersSettings:
    """How the source's answers are drawn."""
    return AnswersSettings(**typed_options(AnswersSettings, bridge.get("answers"), "bridge: answers"))


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
    "BRIDGE_OPTIONS",
    "answer_filters",
    "answers_settings",
    "bridge_method",
    "bridge_name",
    "bridge_training",
    "check_bridge",
]
