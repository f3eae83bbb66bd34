"""Build a chain from a recipe: source -> A1 -> A2 -> ... (paper Sec. 3.1), resumable at any point."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig, PreTrainedTokenizerBase

from cbd_hf._candidates import has_tokenizer, read_config, read_tokenizer
from cbd_hf._files import atomic_write_text, check_output_directory, sha256_of
from cbd_hf._hub import anchor_directory
from cbd_hf._loading import plain_loading
from cbd_hf.chain import MANIFEST, DistillationChain, append_anchor
from cbd_hf.checkpoint import weight_files
from cbd_hf.data.sources import resolve_checkpoint
from cbd_hf.distillation.bridge.pair import check_pair
from cbd_hf.distillation.bridge.recipe import bridge_name
from cbd_hf.distillation.bridge.stage import make_bridge
from cbd_hf.distillation.build_data import BuildData, load_build_data
from cbd_hf.distillation.cache.reader import TeacherCache
from cbd_hf.distillation.claims import claimed
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
from cbd_hf.distillation.rounds import on_main
from cbd_hf.distillation.stages import distil, make_once, measure_once, stage_record, supervise
from cbd_hf.families import check_same_family
from cbd_hf.layout import count_parameters
from cbd_hf.modeling import CBDModel
from cbd_hf.sizing import check_n_params, parse_size, size_name
from cbd_hf.tokenization.limits import fixed_positions, within_positions


logger = logging.getLogger(__name__)

RECIPE = "recipe.json"
_CUT = "cbd_cut.json"
_METRICS = ("bits_per_byte_before", "bits_per_byte_after")
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
    positions: int | None  # of the chain's models, if these cannot read longer rows
    source: Path
    source_name: str
    basis: str
    bridge: Path | None  # what the bridge is before it learns from the source


def build_chain(args: BuildArguments, training: StepwiseDistillationConfig) -> DistillationChain:
    """
    Build the chain of a recipe in `training.output_dir`.

    Every finished stage is committed to the chain at once; what is unfinished lies in `<output_dir>.build`, which is
    removed at the end. Calling it again with the same recipe continues where a killed run stopped, within a stage
    from the last complete checkpoint (`save_steps`). Stages hand over by checkpoint. Models of the recipe's `sizes`
    are made at the end, and a source's answers (`bridge` with `method: sequence`) stay in `<output_dir>.answers`.

    Args:
        args ([`BuildArguments`]): source, anchors, data.
        training ([`StepwiseDistillationConfig`]): options of every stage, which an anchor's `training` may change.

    Returns:
        `DistillationChain`: the finished chain.

    Raises:
        ValueError: the recipe is wrong, or it or a finished anchor changed since the build began; says what differs.
        FileExistsError: `output_dir` holds something else, or another run is building in it.
        ImportError: an option needs a package that is missing.
    """
    check_recipe(args, training)
    _check_options(training)
    chain, work = Path(str(training.output_dir)), Path(f"{training.output_dir}.build")
    # A build that was killed while it added its first anchor has left something of it.
    if not (chain / MANIFEST).is_file() and not (work / RECIPE).is_file():
        check_output_directory(chain)
    with claimed(chain, PartialState()):
        return _build_chain(args, training, chain, work)


def _build_chain(
    args: BuildArguments, training: StepwiseDistillationConfig, chain: Path, work: Path
) -> DistillationChain:
    source = anchor_directory(resolve_checkpoint(args.source))
    bridge = anchor_directory(resolve_checkpoint(args.bridge["checkpoint"])) if args.bridge else None
    largest = bridge or source  # of the chain's own family
    role, name = ("bridge", args.bridge["checkpoint"]) if args.bridge else ("source", args.source)
    read_config(largest, f"The {role} {str(name)!r}")
    if not has_tokenizer(os.listdir(largest)):
        raise ValueError(f"The {role} {str(name)!r} ({largest}) has no tokenizer: save it beside the weights.")
    tokenizer = read_tokenizer(largest, f"the {role} {str(name)!r}")
    sort, positions = _check_anchors(largest, args, tokenizer)
    training.max_length = within_positions(training.max_length, positions)
    if len(args.anchors) + args.include_source + bool(bridge) == 1:
        logger.warning(
            "The chain will have one anchor, and models are made between two: list another one under anchors, or set "
            "include_source."
        )
    data = load_build_data(args, training.dataset_text_field, training.seed)
    digest = {path.name: sha256_of(path) for path in weight_files(source)}
    if bridge:
        digest |= {f"bridge {path.name}": sha256_of(path) for path in weight_files(bridge)}
    record = recipe_record(args, training, json.dumps(digest, sort_keys=True), data.digest)
    on_main(PartialState(), lambda: _check_resumable(chain, work, record))
    _check_first_cache(source, sort, first_cache(args, training))
    build = _Build(
        args=args,
        training=training,
        chain=chain,
        work=work,
        data=data,
        tokenizer=tokenizer,
        positions=positions,
        source=source,
        source_name=args.source,
        basis="importance-sorted" if sort else "as-is",
        bridge=bridge,
    )
    if bridge and not (chain / MANIFEST).is_file():
        check_pair(
            args.bridge or {},
            training,
            source=source,
            student=bridge,
            answers=_answers(chain),
            dataset=data.train,
            tokenizer=build.tokenizer,
        )
    if PartialState().is_main_process:
        work.mkdir(parents=True, exist_ok=True)
        atomic_write_text(work / RECIPE, json.dumps(record, indent=2))
    PartialState().wait_for_everyone()
    _run(build, record)
    if PartialState().is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    PartialState().wait_for_everyone()
    made = DistillationChain.from_pretrained(chain)
    make_sizes(made, args.sizes, models_directory(chain))
    return made


def models_directory(chain: Path) -> Path:
    """Where the models of a recipe's `sizes` go."""
    return Path(f"{chain}.models")


def _answers(chain: Path) -> Path:
    """Where a source's answers stay."""
    return Path(f"{chain}.answers")


def make_sizes(chain: DistillationChain, sizes: Sequence[str | float], directory: Path) -> list[Path]:
    """
    Make models of several sizes from a finished chain, on the main process; those that are there already stay.

    Args:
        chain (`DistillationChain`): finished.
        sizes (`Sequence[str]`): numbers of parameters, such as `138M`.
        directory (`Path`): each model goes to `<directory>/<size>`.

    Returns:
        `list[Path]`: where they are.

    Raises:
        ValueError: a size is outside of the chain's range.
    """
    numbers = [parse_size(str(size)) for size in sizes]
    places = [directory / size_name(number) for number in numbers]
    missing = [pair for pair in zip(numbers, places, strict=True) if not pair[1].exists()]

    def make() -> None:
        with plain_loading():
            CBDModel.save_from_chain(chain, *(list(values) for values in zip(*missing, strict=True)))

    if on_main(PartialState(), lambda: bool(missing)):  # as the others may look later
        on_main(PartialState(), make)
    return places


def _shape_options(anchor: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in anchor.items() if name in {*SHAPE_OPTIONS, "n_params"}}


def _check_options(training: StepwiseDistillationConfig) -> None:
    """Raise if options of the trainer are set that a build cannot heed, rather than ignore them."""
    remedies = {
        "teacher_model_name_or_path": "the source and each anchor are the teachers in turn: name `source`",
        "resume_from_checkpoint": "the same command goes on where it was",
        "push_to_hub": "push the finished chain: DistillationChain.from_pretrained(output_dir).push_to_hub(...)",
        "do_eval": "leave eval_strategy out, each anchor is measured before and after its stage (eval_documents)",
    }
    for name, remedy in remedies.items():
        if getattr(training, name, None):
            raise ValueError(f"{name}={getattr(training, name)!r} has no meaning in a build; {remedy}.")


def _check_anchors(largest: Path, args: BuildArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, int | None]:
    """
    Walk the chain's configs before any work: whether one of the cuts is narrower than what it is cut from, and the
    positions that all models have.
    """
    config, narrower, public = AutoConfig.from_pretrained(largest), False, False
    counts, configs = [count_parameters(config)], [config]
    for anchor in args.anchors:
        shape = _shape_options(anchor)
        if shape:
            narrower = narrower or changes_width(config, shape)
            smaller = cut_config(config, shape)
        else:
            public = True
            checkpoint = anchor_directory(resolve_checkpoint(anchor["checkpoint"]))
            smaller = read_config(checkpoint, f"Anchor {anchor['name']!r} ({anchor['checkpoint']})")
            check_same_family(smaller, config)
            _check_tokens(anchor["name"], checkpoint, tokenizer)
        configs.append(smaller)
        counts.append(count_parameters(smaller))
        if counts[-1] >= counts[-2]:
            raise ValueError(f"Anchor {anchor['name']!r} is not smaller than the one before: list the largest first.")
        config = smaller
    begins = 0 if args.include_source or args.bridge else 1  # the first of them that is in the chain
    for size in args.sizes:
        check_n_params(parse_size(str(size)), counts[-1], counts[begins])
    if narrower and public:
        raise ValueError(
            "A chain cannot both start anchors from public checkpoints and cut others narrower: a cut in width needs "
            "the source's sorted coordinates, which a public checkpoint does not share. Cut layers only, or drop one."
        )
    return narrower, fixed_positions(*configs)


def _check_tokens(name: str, checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if a checkpoint's own tokenizer is another one: stages compare models token by token."""
    if not has_tokenizer(os.listdir(checkpoint)):
        logger.warning("Anchor %r (%s) has no tokenizer and is taken to have the chain's.", name, checkpoint)
        return
    own = read_tokenizer(checkpoint, f"anchor {name!r}")
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"The tokenizer of anchor {name!r} ({checkpoint}, {len(own)} tokens) is not the chain's "
            f"({len(tokenizer)} tokens): choose a checkpoint with the same one, or give it the chain's vocabulary "
            "first (`cbd transplant`)."
        )


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
        if differences(what_is_learnt(begun), record) and not _worth_keeping(work):
            shutil.rmtree(work)  # a mistake that showed late, or a kill before anything was learnt
            return
    else:
        return
    changed = differences(what_is_learnt(begun), record)
    if any(line.startswith("rows_per_step") for line in changed):
        changed.append("(rows_per_step: per_device_train_batch_size x gradient_accumulation_steps x processes)")
    if changed:
        raise ValueError(
            f"The recipe differs from the one that {chain} was begun with:\n  "
            + "\n  ".join(changed)
            + "\nRestore it to continue that build, or choose another output_dir (nothing was changed), or remove "
            f"{chain} and {work} to start over. What does not change what is learnt may differ, such as "
            "max_loss_ratio, teacher_placement and save_steps."
        )


def _worth_keeping(work: Path) -> bool:
    """Whether an unfinished build has trained anything: a checkpoint, or a phase that is done."""
    return any(
        path.name.startswith("checkpoint-") or path.name in ("trained", "supervised", "source-supervised")
        for path in work.rglob("*")
        if path.is_dir()
    )


def _run(build: _Build, record: dict[str, Any]) -> None:
    finished = len(DistillationChain.from_pretrained(build.chain)) if (build.chain / MANIFEST).is_file() else 0
    first: list[dict[str, Any]] = [_SOURCE] if build.args.include_source else []
    if build.args.bridge:
        first = [{"name": bridge_name(build.args.bridge)}]
    stages = [*first, *build.args.anchors]
    if finished == len(stages):
        return
    teacher, teacher_name = build.source, "source"
    if not build.args.bridge:
        teacher = _prepared_source(build)
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
            elif stage in first:
                _announce(1, len(stages), build.source_name, stage["name"])
                checkpoint, details = _bridge_anchor(build, stage["name"])
            else:
                _announce(position + 1, len(stages), teacher_name, stage["name"])
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


def _announce(number: int, stages: int, teacher: str, student: str) -> None:
    PartialState().print(f"Stage {number} of {stages}: {teacher} -> {student}", flush=True)


def _prepared_source(build: _Build) -> Path:
    """The source after its supervised phase and in the chain's basis."""
    source = build.source
    if build.args.supervised:
        output = build.work / "source-supervised"
        source = supervise(source, output, build.args.supervised, build.training, build.data.train, build.tokenizer)
    return _in_basis(build, source, build.work / "source-sorted")


def _in_basis(build: _Build, source: Path, directory: Path) -> Path:
    """The chain's largest model with its coordinates sorted, where anchors are cut narrower."""
    if build.basis == "as-is":
        return source

    def sort(directory: Path) -> None:
        sorted_checkpoint(source, build.data.calibration(build.tokenizer, build.positions), directory)
        build.tokenizer.save_pretrained(directory)

    return make_once(directory, sort)


def _bridge_anchor(build: _Build, name: str) -> tuple[Path, dict[str, Any]]:
    """(trained checkpoint, its `stage` and `cut` records) of anchor zero of a source of another family."""
    assert build.bridge is not None and build.args.bridge is not None
    directory = build.work / name
    before = _measure(build, f"{name}/before", build.bridge)
    data = {"dataset": build.args.dataset, "sha256": build.data.digest}
    try:
        trained, stage = make_bridge(
            build.args.bridge,
            build.training,
            source=build.source,
            source_name=build.source_name,
            student=build.bridge,
            work=directory,
            answers=_answers(build.chain),
            dataset=build.data.train,
            data=data,
            tokenizer=build.tokenizer,
        )
    except LossError as error:
        raise LossError(f"{error}\n{_AFTER_A_BAD_LOSS.format(name=name)}") from error
    after = _measure(build, f"{name}/after", trained)
    if before and after:
        stage["metrics"] = {key: value["bits_per_byte"] for key, value in zip(_METRICS, (before, after), strict=True)}
    return _in_basis(build, trained, directory / "sorted"), {"stage": stage, "cut": None}


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
            record = cut_checkpoint(teacher, config, build.data.calibration(build.tokenizer, build.positions), staging)
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
        metrics = {key: value["bits_per_byte"] for key, value in zip(_METRICS, (before, after), strict=True)}
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


__all__ = ["build_chain", "make_sizes", "models_directory"]
