"""The steps of one stage of a chain build; each leaves a finished directory, or nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DeepSpeedPlugin, PartialState
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from cbd_hf._files import atomic_write_text, commit_directory, remove_staging, staging_directory
from cbd_hf._loading import plain_loading
from cbd_hf.data.columns import dataset_kind
from cbd_hf.distillation.columns import supervise_turns
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.recipe import supervised_options
from cbd_hf.distillation.resuming import save_whole, train_resumably
from cbd_hf.distillation.teacher import load_model
from cbd_hf.distillation.trainer import StepwiseDistillationTrainer
from cbd_hf.evaluation.language_modeling import evaluate_language_modeling


if TYPE_CHECKING:
    from datasets import Dataset

BRIDGE_RECORD = "cbd_bridge.json"  # in the directory of a bridge: what it has learnt

Describe = Callable[[dict[str, Any]], dict[str, Any]]  # makes the record of a training out of its result

_PACKAGES = ("accelerate", "cbd_hf", "datasets", "peft", "torch", "transformers", "trl")


def own_deepspeed(config: SFTConfig) -> None:
    """A DeepSpeed plugin for this stage alone: accelerate refuses one while the state of the last Trainer stands."""
    if config.deepspeed_plugin is not None:
        AcceleratorState._reset_state()
        config.deepspeed_plugin = DeepSpeedPlugin()
        config.deepspeed_plugin.set_mixed_precision(config.mixed_precision)
        config.deepspeed_plugin.set_deepspeed_weakref()


def make_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """Let the main process fill `directory`, committed in one step; nothing if it exists. Others wait."""
    state = PartialState()
    if state.is_main_process and not directory.exists():
        remove_staging(directory)
        with staging_directory(directory) as staging, plain_loading():
            make(staging)
            commit_directory(staging, directory)
    state.wait_for_everyone()
    return directory


def measure_once(
    path: Path, checkpoint: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> dict[str, float] | None:
    """Held-out loss of a checkpoint, kept in the JSON file `path`; `None` without texts."""
    if not texts:
        return None
    state = PartialState()
    if state.is_main_process and not path.exists():
        with plain_loading():
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        positions = getattr(model.config, "max_position_embeddings", None) or max_length
        result = evaluate_language_modeling(
            model, tokenizer, texts, max_length=min(max_length, positions), device=state.device
        )
        atomic_write_text(path, json.dumps(result.to_dict()))
    state.wait_for_everyone()
    return json.loads(path.read_text())


def _train(trainer: Trainer, output: Path, save: Callable[[Path], None]) -> None:
    """Train from the last complete checkpoint, then commit what `save` writes as `output`."""
    train_resumably(trainer, own_directory=True)
    save_whole(output, save)
    _remove(Path(str(trainer.args.output_dir)))


def _remove(unfinished: Path) -> None:
    if PartialState().is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    PartialState().wait_for_everyone()


def _write(path: Path, record: Mapping[str, Any]) -> None:
    atomic_write_text(path, json.dumps(record, indent=1, default=str) + "\n")


def _result(trainer: Trainer, started: float) -> dict[str, Any]:
    return {
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "seconds": round(time.perf_counter() - started, 1),
    }


def supervise(
    checkpoint: Path,
    output: Path,
    options: Mapping[str, Any],
    base: StepwiseDistillationConfig,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    describe: Describe | None = None,
) -> Path:
    """
    Fine-tune a checkpoint on the data itself (the paper's first phase, App. B.1) with TRL's `SFTTrainer`.

    Options of `base` that `SFTConfig` knows apply unless `options` changes them. Unfinished work lies in a directory
    of this output alone: checkpoints of another model are never resumed from.
    """
    unfinished = output.with_name(f"{output.name}-trainer")
    if output.exists():
        _remove(unfinished)  # of a run that was killed while it removed it
        return output
    shared = {
        entry.name: getattr(base, entry.name)
        for entry in dataclasses.fields(SFTConfig)
        if entry.init and entry.name in _SHARED_WITH_SUPERVISED
    }
    return supervise_with(
        SFTConfig(
            **shared
            | {"save_total_limit": 2, "include_num_input_tokens_seen": "non_padding" if describe else "no"}
            | supervised_options(options)
            | {"output_dir": str(unfinished)}
        ),
        checkpoint,
        output,
        dataset,
        tokenizer,
        describe,
    )


def supervise_with(
    config: SFTConfig,
    checkpoint: Path | str,
    output: Path,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    describe: Describe | None = None,
) -> Path:
    """
    [`supervise`] with options of its own, whose `output_dir` is for unfinished work.

    With `describe` the record that it makes of steps, tokens and seconds goes into `output` as `cbd_bridge.json`.
    """
    started = time.perf_counter()
    own_deepspeed(config)
    if dataset_kind(dataset.column_names, config.dataset_text_field) == "messages":
        dataset = supervise_turns(dataset, tokenizer)  # SFTTrainer would train the user's turns as well
    trainer = SFTTrainer(
        load_model(str(checkpoint), config.model_init_kwargs, config.trust_remote_code, torch.float32),
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
    )

    def save(directory: Path) -> None:
        trainer.save_model(str(directory))
        if describe and trainer.is_world_process_zero():
            _write(directory / BRIDGE_RECORD, describe(_result(trainer, started)))

    _train(trainer, output, save)
    return output


_SHARED_WITH_SUPERVISED = {
    "bf16",
    "dataset_text_field",
    "disable_tqdm",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "logging_steps",
    "max_length",
    "packing",
    "packing_strategy",
    "per_device_train_batch_size",
    "report_to",
    "save_steps",
    "seed",
    "use_cpu",
}


def distil(
    student: Path,
    teacher: Path,
    output: Path,
    config: StepwiseDistillationConfig,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """
    Distil `teacher` into `student` and save the result as `output`.

    The weights are trained from float32, whatever they are stored in: AdamW loses small updates in bf16.

    Returns:
        `dict[str, Any]`: steps, tokens, seconds and the last logged divergence; kept in `output`'s sibling JSON file.
    """

    def make() -> StepwiseDistillationTrainer:
        own_deepspeed(config)
        return StepwiseDistillationTrainer(
            AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
            str(teacher),
            config,
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return train_once(output, make)


def train_once(
    output: Path, make_trainer: Callable[[], StepwiseDistillationTrainer], describe: Describe | None = None
) -> dict[str, Any]:
    """
    Train and save an anchor as `output`, unless that has been done; see [`distil`] for what is returned.

    Args:
        output (`Path`): where the anchor goes.
        make_trainer (`Callable`): called if there is something to train.
        describe (`Callable`, *optional*): makes a record of what is returned, which goes into `output` as
            `cbd_bridge.json` and is returned. By default the record is a file beside `output`.
    """
    record_path = output / BRIDGE_RECORD if describe else output.with_name(f"{output.name}.json")
    if output.exists() and record_path.exists():
        return json.loads(record_path.read_text())
    started = time.perf_counter()
    trainer = make_trainer()

    def save(directory: Path) -> None:
        trainer.save_anchor(directory)
        logged = [entry for entry in trainer.state.log_history if "divergence" in entry]
        last = logged[-1] if logged else {}
        if trainer.is_world_process_zero():
            record = _result(trainer, started) | {"last_divergence": last.get("divergence")}
            record |= {name: last[name] for name in _ALIGNMENT if name in last}
            if describe:
                _write(directory / BRIDGE_RECORD, describe(record))
            else:
                _write(record_path, record)

    _train(trainer, output, save)
    return json.loads(record_path.read_text())


# What a bridge logs beside the loss.
_ALIGNMENT = ("align_ratio", "span_ratio", "vocabulary_coverage_student", "vocabulary_coverage_source")


def _hidden_loss(config: StepwiseDistillationConfig) -> dict[str, Any]:
    names = ("hidden_loss_weight", "hidden_loss_layers") if config.hidden_loss_weight else ()
    return {name: getattr(config, name) for name in names}


def packages() -> dict[str, str]:
    """Versions of what takes part in a training."""
    return {name: version(name) for name in _PACKAGES}


def stage_record(
    teacher: str, config: StepwiseDistillationConfig, data: Mapping[str, Any], result: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Provenance of a stage, for the chain's manifest."""
    return {
        "teacher": teacher,
        "objective": {
            "name": config.objective,
            "temperature": config.temperature,
            "cross_entropy_weight": config.cross_entropy_weight,
            "lmbda": config.lmbda,
        }
        | config.make_objective().options
        | _hidden_loss(config),
        "teacher_dtype": str(config.teacher_torch_dtype()).removeprefix("torch."),
        "teacher_cache": config.teacher_cache,
        "learning_rate": config.learning_rate,
        "data": dict(data),
        "seed": config.seed,
        "packages": packages(),
        **result,
        **more,
    }


__all__ = [
    "BRIDGE_RECORD",
    "Describe",
    "distil",
    "make_once",
    "measure_once",
    "own_deepspeed",
    "packages",
    "stage_record",
    "supervise",
    "supervise_with",
    "train_once",
]
