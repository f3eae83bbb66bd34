"""The stage of a chain build that makes anchor zero: a model of the chain's family learns from a source of another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cbd_hf.distillation.answers.build import build_answers
from cbd_hf.distillation.answers.filters import AnswerFilters
from cbd_hf.distillation.answers.manifest import AnswersManifest
from cbd_hf.distillation.answers.reader import load_answers
from cbd_hf.distillation.bridge.config import SEQUENCE, BridgeDistillationConfig
from cbd_hf.distillation.bridge.recipe import (
    answer_filters,
    answers_run,
    answers_settings,
    bridge_method,
    bridge_training,
)
from cbd_hf.distillation.bridge.trainer import BridgeDistillationTrainer
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.stages import (
    BRIDGE_RECORD,
    Describe,
    own_deepspeed,
    packages,
    stage_record,
    supervise,
    train_once,
)
from cbd_hf.distillation.teacher import load_model


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
    answers: Path,
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
        answers (`Path`): directory of the source's answers, which stay.
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
    more: dict[str, Any] = {"supervised": bridge.get("supervised"), "initial": bridge["checkpoint"]}
    trained = work / "trained"
    if bridge_method(bridge) != SEQUENCE:
        config = bridge_training(training, bridge, work / "trainer")
        result = train_bridge(student, source, trained, config, dataset, tokenizer, source_tokenizer)
        return trained, bridge_record(source_name, config, data, result, **more)
    run = answers_run(bridge).options(tuned=bool(bridge.get("supervised")))
    build_answers(source, dataset, answers, answers_settings(bridge), name=str(data["dataset"]), **run)
    filters, options = answer_filters(bridge), bridge.get("training") or {}
    rows, dropped = load_answers(answers, filters)
    supervise(student, trained, options, training, rows, tokenizer, describe=dict)
    result = json.loads((trained / BRIDGE_RECORD).read_text(encoding="utf-8"))
    made = answers_record(answers, filters, len(rows), dropped)
    made["source"]["name"] = source_name
    more |= {"training": dict(options), "data": dict(data), "seed": options.get("seed", training.seed)}
    return trained, sequence_record(made, result, **more)


def answers_record(answers: Path, filters: AnswerFilters, kept: int, dropped: Mapping[str, int]) -> dict[str, Any]:
    """
    What answers a bridge has learnt from: how they were made, which filters left how many.

    Args:
        answers (`Path`): their directory.
        filters ([`AnswerFilters`]): which answers are left out.
        kept (`int`): answers that are not.
        dropped (`Mapping`): option -> answers that it has dropped.
    """
    made = AnswersManifest.read(answers).provenance()
    return made | {"filters": dataclasses.asdict(filters), "kept": kept, "dropped": dict(dropped)}


def sequence_record(answers: Mapping[str, Any], result: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Provenance of a bridge that has learnt answers, from [`answers_record`]."""
    return {
        "teacher": answers["source"]["name"],
        "objective": {"name": SEQUENCE},
        "answers": dict(answers),
        "packages": packages(),
        **result,
        **more,
    }


def bridge_record(
    source: str, config: BridgeDistillationConfig, data: Mapping[str, Any], result: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Provenance of a bridge that a source has taught token by token; as [`stage_record`]."""
    record = stage_record(source, config, data, result, **more)
    objective: dict[str, Any] = {
        "name": config.method,
        "cross_entropy_weight": config.cross_entropy_weight,
        "temperature": config.temperature,
    }
    if config.method in ("mined", "overlap_kl"):
        objective |= {"divergence": config.objective, **config.make_objective().options}
    if config.method == "alm":
        objective |= {name: getattr(config, name) for name in ("alm_temperature", "alm_debias", "alm_bias_threshold")}
    if config.method == "uld":
        objective["uld_tokens"] = config.uld_tokens
    if config.hidden_loss_weight:
        objective |= {name: getattr(config, name) for name in ("hidden_loss_weight", "hidden_loss_layers")}
    rows = {name: getattr(config, name) for name in ("source_prompt", "max_length", "source_max_length")}
    return record | {"objective": objective, "rows": rows}


def train_bridge(
    student: Path,
    source: Path,
    output: Path,
    config: BridgeDistillationConfig,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer: PreTrainedTokenizerBase,
    describe: Describe | None = None,
) -> dict[str, Any]:
    """
    Distil a source of other tokens into `student` and save the result as `output`.

    Args:
        describe (`Callable`, *optional*): see [`~cbd_hf.distillation.stages.train_once`].

    Returns:
        `dict[str, Any]`: as [`~cbd_hf.distillation.stages.distil`].
    """

    def make() -> BridgeDistillationTrainer:
        own_deepspeed(config)
        return BridgeDistillationTrainer(
            load_model(str(student), config.model_init_kwargs, config.trust_remote_code, torch.float32),
            # With a cache its tokenizer is enough; weights that are there are compared with the cache's.
            None if config.teacher_cache and not any(source.glob("*.safetensors")) else str(source),
            config,
            train_dataset=dataset,
            processing_class=tokenizer,
            teacher_processing_class=source_tokenizer,
        )

    return train_once(output, make, describe)


__all__ = ["answers_record", "bridge_record", "make_bridge", "sequence_record", "train_bridge"]
