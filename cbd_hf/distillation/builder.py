"""Build a chain from a recipe: source -> A1 -> A2 -> ... (paper Sec. 3.1), resumable at any point."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from cbd_hf._files import atomic_write_text, check_output_directory, sha256_of
from cbd_hf._hub import anchor_directory
from cbd_hf.chain import MANIFEST, DistillationChain, append_anchor
from cbd_hf.checkpoint import weight_files
from cbd_hf.data.sources import resolve_checkpoint
from cbd_hf.distillation.build_data import BuildData, load_build_data
from cbd_hf.distillation.cache.reader import TeacherCache
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.cutting import (
    SHAPE_OPTIONS,
    changes_width,
    cut_checkpoint,
    cut_config,
    sorted_checkpoint,
)
from cbd_hf.distillation.guards import LossError
from cbd_hf.distillation.recipe import (
    BuildArguments,
    check_recipe,
    differences,
    first_cache,
    recipe_record,
    stage_training,
    what_is_learnt,
)
from cbd_hf.distillation.stages import distil, make_once, measure_once, stage_record, supervise
from cbd_hf.families import check_same_family
from cbd_hf.layout import count_parameters


logger = logging.getLogger(__name__)

RECIPE = "recipe.json"
_CUT = "cbd_cut.json"
_AFTER_A_BAD_LOSS = (
    "This was a build's stage, {name}. If the loss was right, raise max_loss_ratio and run the same command again: it "
    "goes on from the last complete checkpoint. Another learning_rate or dataset makes another chain: choose a new "
    "output_dir, where `training` of an anchor can change one stage alone."
)
_SOURCE: dict[str, Any] = {"name": "source"}  # the stage that only adds the source itself


@dataclass(frozen=True)
class _Build:
    args: BuildArguments
    training: StepwiseDistillationConfig
    chain: Path
    work: Path
    data: BuildData
    tokenizer: PreTrainedTokenizerBase
    source: Path
    source_name: str
    basis: str


def build_chain(args: BuildArguments, training: StepwiseDistillationConfig) -> DistillationChain:
    """
    Build the chain of a recipe in `training.output_dir`.

    Every finished stage is committed to the chain at once; what is unfinished lies in `<output_dir>.build`, which is
    removed at the end. Calling it again with the same recipe continues where a killed run stopped, within a stage
    from the last complete checkpoint (`save_steps`). Stages hand over by checkpoint.

    Args:
        args ([`BuildArguments`]): source, anchors, data.
        training ([`StepwiseDistillationConfig`]): options of every stage, which an anchor's `training` may change.

    Returns:
        `DistillationChain`: the finished chain.

    Raises:
        ValueError: the recipe is wrong, or it or a finished anchor changed since the build began; says what differs.
        FileExistsError: `output_dir` holds something else.
    """
    check_recipe(args, training)
    chain, work = Path(str(training.output_dir)), Path(f"{training.output_dir}.build")
    # A build that was killed while it added its first anchor has left something of it.
    if not (chain / MANIFEST).is_file() and not (work / RECIPE).is_file():
        check_output_directory(chain)
    source = anchor_directory(resolve_checkpoint(args.source))
    data = load_build_data(args, training.dataset_text_field, training.seed)
    digest = {path.name: sha256_of(path) for path in weight_files(source)}
    record = recipe_record(args, training, json.dumps(digest, sort_keys=True), data.digest)
    _check_resumable(chain, work, record)
    sort = _check_anchors(source, args.anchors)
    _check_first_cache(source, sort, first_cache(args, training))
    build = _Build(
        args=args,
        training=training,
        chain=chain,
        work=work,
        data=data,
        tokenizer=AutoTokenizer.from_pretrained(source),
        source=source,
        source_name=args.source,
        basis="importance-sorted" if sort else "as-is",
    )
    if PartialState().is_main_process:
        work.mkdir(parents=True, exist_ok=True)
        atomic_write_text(work / RECIPE, json.dumps(record, indent=2))
    PartialState().wait_for_everyone()
    _run(build, record)
    if PartialState().is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    PartialState().wait_for_everyone()
    return DistillationChain.from_pretrained(chain)


def _shape_options(anchor: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in anchor.items() if name in {*SHAPE_OPTIONS, "n_params"}}


def _check_anchors(source: Path, anchors: list[dict[str, Any]]) -> bool:
    """Walk the chain's configs before any work; whether one of the cuts is narrower than what it is cut from."""
    config, narrower, public = AutoConfig.from_pretrained(source), False, False
    for anchor in anchors:
        shape = _shape_options(anchor)
        if shape:
            narrower = narrower or changes_width(config, shape)
            smaller = cut_config(config, shape)
        else:
            public = True
            smaller = AutoConfig.from_pretrained(anchor_directory(resolve_checkpoint(anchor["checkpoint"])))
            check_same_family(smaller, config)
        if count_parameters(smaller) >= count_parameters(config):
            raise ValueError(f"Anchor {anchor['name']!r} is not smaller than the one before: list the largest first.")
        config = smaller
    if narrower and public:
        raise ValueError(
            "A chain cannot both start anchors from public checkpoints and cut others narrower: a cut in width needs "
            "the source's sorted coordinates, which a public checkpoint does not share. Cut layers only, or drop one."
        )
    return narrower


def _check_first_cache(source: Path, sort: bool, directory: str | None) -> None:
    """Raise if the first stage's cache has the predictions of another model than the source as it will teach."""
    if directory is None:
        return
    if sort:
        raise ValueError(
            f"teacher_cache={directory!r} has the predictions of the source as it is, but an anchor that is narrower "
            "sorts the source's coordinates first: leave the cache out, or cut layers only."
        )
    TeacherCache.from_pretrained(directory).check(teacher=source)


def _check_resumable(chain: Path, work: Path, record: dict[str, Any]) -> None:
    """Raise unless what has been begun, if anything, was begun with this very recipe and is unharmed."""
    if (chain / MANIFEST).is_file():
        begun = DistillationChain.from_pretrained(chain, verify="full").metadata.get("recipe")
        if begun is None:
            raise FileExistsError(
                f"{chain} holds a chain that was not built from a recipe: choose another output_dir."
            )
    elif (work / RECIPE).is_file():
        begun = json.loads((work / RECIPE).read_text())
    else:
        return
    changed = differences(what_is_learnt(begun), record)
    if any(line.startswith("rows_per_step") for line in changed):
        changed.append("(rows_per_step: per_device_train_batch_size x gradient_accumulation_steps x processes)")
    if changed:
        raise ValueError(
            f"The recipe differs from the one that {chain} was begun with:\n  "
            + "\n  ".join(changed)
            + "\nRestore it to continue that build, or choose another output_dir (nothing was changed). What does not "
            "change what is learnt may differ, such as max_loss_ratio, teacher_placement and save_steps."
        )


def _run(build: _Build, record: dict[str, Any]) -> None:
    finished = len(DistillationChain.from_pretrained(build.chain)) if (build.chain / MANIFEST).is_file() else 0
    stages: list[dict[str, Any]] = [*([_SOURCE] if build.args.include_source else []), *build.args.anchors]
    if finished == len(stages):
        return
    teacher, teacher_name = _prepared_source(build), "source"
    metadata: dict[str, Any] = {"recipe": record, "base_model": build.source_name}
    if build.args.license:
        metadata["license"] = build.args.license
    for position, stage in enumerate(stages):
        if position >= finished:
            details: dict[str, Any] = {"stage": None, "cut": None}
            checkpoint = teacher
            if stage is _SOURCE:
                measured = _measure(build, "source", teacher)
                metadata["source_bits_per_byte"] = measured["bits_per_byte"] if measured else None
            else:
                logger.info("Stage %d of %d: %s -> %s", position + 1, len(stages), teacher_name, stage["name"])
                checkpoint, details = _distil_anchor(build, stage, teacher, teacher_name)
            if PartialState().is_main_process:
                append_anchor(
                    build.chain,
                    checkpoint,
                    name=stage["name"],
                    basis=build.basis,
                    metadata=metadata,
                    tokenizer=build.tokenizer,
                    **details,
                )
                shutil.rmtree(build.work / stage["name"], ignore_errors=True)
            PartialState().wait_for_everyone()
        anchor = DistillationChain.from_pretrained(build.chain)[position]
        teacher, teacher_name = anchor.path, anchor.name


def _prepared_source(build: _Build) -> Path:
    """The source after its supervised phase and in the chain's basis."""
    source = build.source
    if build.args.supervised:
        output = build.work / "source-supervised"
        source = supervise(source, output, build.args.supervised, build.training, build.data.train, build.tokenizer)
    if build.basis == "as-is":
        return source

    def sort(directory: Path) -> None:
        sorted_checkpoint(source, build.data.calibration(build.tokenizer), directory)
        build.tokenizer.save_pretrained(directory)

    return make_once(build.work / "source-sorted", sort)


def _distil_anchor(
    build: _Build, anchor: dict[str, Any], teacher: Path, teacher_name: str
) -> tuple[Path, dict[str, Any]]:
    """(trained checkpoint, its `stage` and `cut` records) of one anchor."""
    directory = build.work / anchor["name"]
    cut = None
    if "checkpoint" in anchor:
        student = anchor_directory(resolve_checkpoint(anchor["checkpoint"]))
        check_same_family(AutoConfig.from_pretrained(student), AutoConfig.from_pretrained(teacher))
    else:
        config = cut_config(AutoConfig.from_pretrained(teacher), _shape_options(anchor))

        def make(staging: Path) -> None:
            record = cut_checkpoint(teacher, config, build.data.calibration(build.tokenizer), staging)
            (staging / _CUT).write_text(json.dumps(record))

        student = make_once(directory / "cut", make)
        if teacher_name != "source" or build.args.include_source:
            cut = {"from": teacher_name, **json.loads((student / _CUT).read_text())}
    before = _measure(build, f"{anchor['name']}/before", student)
    supervised = anchor.get("supervised", build.args.supervised)
    if supervised:
        student = supervise(
            student, directory / "supervised", supervised, build.training, build.data.train, build.tokenizer
        )
    training = stage_training(build.training, anchor.get("training"), directory / "trainer")
    trained = directory / "trained"
    try:
        result = distil(student, teacher, trained, training, build.data.train, build.tokenizer)
    except LossError as error:
        raise LossError(f"{error}\n{_AFTER_A_BAD_LOSS.format(name=anchor['name'])}") from error
    after = _measure(build, f"{anchor['name']}/after", trained)
    metrics = {}
    if before and after:
        metrics = {"bits_per_byte_before": before["bits_per_byte"], "bits_per_byte_after": after["bits_per_byte"]}
    data = {"dataset": build.args.dataset, "sha256": build.data.digest}
    teacher_label = build.source_name if teacher_name == "source" else teacher_name
    stage = stage_record(
        teacher_label,
        training,
        data,
        result,
        metrics=metrics,
        supervised=supervised,
        initial=anchor.get("checkpoint", "cut"),
    )
    return trained, {"stage": stage, "cut": cut}


def _measure(build: _Build, name: str, checkpoint: Path) -> dict[str, float] | None:
    path = build.work / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return measure_once(path, checkpoint, build.tokenizer, build.data.held_out, build.args.eval_max_length)


__all__ = ["build_chain"]
