"""The stage of a chain build that makes anchor zero: a model of the chain's family learns from a source of another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cbd_hf.distillation.answers.build import build_answers
from cbd_hf.distillation.answers.reader import load_answers
from cbd_hf.distillation.bridge.config import SEQUENCE, BridgeDistillationConfig
from cbd_hf.distillation.bridge.recipe import (
    answer_filters,
    answers_settings,
    bridge_method,
    bridge_training,
)
from cbd_hf.distillation.bridge.trainer import BridgeDistillationTrainer
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.stages import own_deepspeed, stage_record, supervise, train_once


if TYPE_CHECKING:
    from datasets import Dataset


def make_bridge(
    bridge: Mapping[str, Any],
    training: StepwiseDistillationConfig,
    *,
    source: Path,
    source_name: str,
    student: Path,
    work: Path,
    dataset: Dataset,
    data: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Path, dict[str, Any]]:
    """
    Make a bridge, or take what an earlier run has left of it; see [`~cbd_hf.distillation.builder.build_chain`].

    Args:
        bridge (`Mapping`): of the recipe, checked.
        training ([`StepwiseDistillationConfig`]): the recipe's options of every stage.
        source (`Path`): the source's checkpoint.
        source_name (`str`): as the recipe names it.
        student (`Path`): the checkpoint that becomes the bridge.
        work (`Path`): directory of unfinished work.
        dataset (`Dataset`): training rows.
        data (`Mapping`): what they are, for the record.
        tokenizer (`PreTrainedTokenizerBase`): the bridge's.

    Returns:
        `tuple[Path, dict]`: the trained checkpoint, and the record of the stage.
    """
    source_tokenizer = AutoTokenizer.from_pretrained(source)
    if bridge.get("supervised"):
        source = supervise(
            source, work / "source-supervised", bridge["supervised"], training, dataset, source_tokenizer
        )
    config = bridge_training(training, {} if bridge_method(bridge) == SEQUENCE else bridge, work / "trainer")
    more: dict[str, Any] = {"supervised": bridge.get("supervised"), "initial": bridge["checkpoint"]}
    if bridge_method(bridge) != SEQUENCE:
        trained = work / "trained"
        result = train_bridge(student, source, trained, config, dataset, tokenizer, source_tokenizer)
        return trained, stage_record(source_name, config, data, result, **more, **_objective(config))
    settings, filters = answers_settings(bridge), answer_filters(bridge)
    answers = work / "answers"
    report = build_answers(source, dataset, answers, settings, name=str(data["dataset"]))
    rows, dropped = load_answers(answers, filters)
    trained = supervise(student, work / "trained", bridge.get("training") or {}, training, rows, tokenizer)
    more["answers"] = {"answers": report.answers, "tokens": report.tokens, "kept": len(rows), "dropped": dropped}
    more["answers"]["settings"] = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k", "seed")}
    record = stage_record(source_name, config, data, {}, training=dict(bridge.get("training") or {}), **more)
    # Neither the source nor these options of the recipe are used in this training.
    for name in ("learning_rate", "teacher_cache", "teacher_dtype"):
        del record[name]
    return trained, record | {"objective": {"name": SEQUENCE}}


def _objective(config: BridgeDistillationConfig) -> dict[str, Any]:
    """What replaces the stepwise trainer's objective in the record."""
    objective: dict[str, Any] = {
        "name": config.method,
        "cross_entropy_weight": config.cross_entropy_weight,
        "temperature": config.temperature,
    }
    if config.method in ("mined", "overlap_kl"):
        objective |= {"divergence": config.objective, **config.make_objective().options}
    if config.method == "alm":
        objective["alm_temperature"] = config.alm_temperature
    return {"objective": objective}


def train_bridge(
    student: Path,
    source: Path,
    output: Path,
    config: BridgeDistillationConfig,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """
    Distil a source of other tokens into `student` and save the result as `output`.

    Returns:
        `dict[str, Any]`: as [`~cbd_hf.distillation.stages.distil`].
    """

    def make() -> BridgeDistillationTrainer:
        own_deepspeed(config)
        return BridgeDistillationTrainer(
            AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
            # With a cache its tokenizer is enough; weights that are there are compared with the cache's.
            None if config.teacher_cache and not any(source.glob("*.safetensors")) else str(source),
            config,
            train_dataset=dataset,
            processing_class=tokenizer,
            teacher_processing_class=source_tokenizer,
        )

    return train_once(output, make)


__all__ = ["make_bridge", "train_bridge"]
