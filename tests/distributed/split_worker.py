"""
Run cases of tests/distributed/cases.py one behind the other, in one process or as one of several, and keep what came
of each.

    python -m tests.distributed.split_worker RUNS.json
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from cbd_hf import StepwiseDistillationConfig, StepwiseDistillationTrainer
from cbd_hf._ending import run_and_end
from cbd_hf.distillation.bridge.config import BridgeDistillationConfig
from cbd_hf.distillation.bridge.trainer import BridgeDistillationTrainer
from cbd_hf.distillation.heads import decoder_layers
from cbd_hf.distillation.stages import own_deepspeed

from .cases import CASES, Case, make_dataset, make_text, source_tokenizer, student_tokenizer


class _Gradient(TrainerCallback):
    """Takes the whole gradient before the first optimizer step, whatever it is sharded by."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.values: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.trainer.model_wrapped
        if args.deepspeed_plugin is None:
            return
        step = engine.step

        def take_and_step(*args: Any, **kwargs: Any) -> Any:
            from deepspeed.utils import safe_get_full_grad

            self._take(lambda parameter: safe_get_full_grad(parameter))
            return step(*args, **kwargs)

        engine.step = take_and_step  # the engine steps within accelerate's backward

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.deepspeed_plugin is None:
            self._take(lambda parameter: parameter.grad)

    def _take(self, read: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        if self.values:
            return
        for name, parameter in self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped).named_parameters():
            if parameter.requires_grad and (value := read(parameter)) is not None:
                value = value.full_tensor() if isinstance(value, DTensor) else value
                self.values[name] = value.detach().float().cpu().clone()


def make_trainer(case: Case, directory: Path, material: Path, micro_batch: int, accumulation: int, **more: Any) -> Any:
    """A trainer of a case, with its models loaded from `material`."""
    options = {
        "output_dir": str(directory),
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_new_tokens": 8,
        "bf16": False,
    }
    make_config = BridgeDistillationConfig if case.bridge else StepwiseDistillationConfig
    args = make_config(**options | case.options | more)
    if case.cache:
        args.teacher_cache = str(material / case.cache)
    own_deepspeed(args)
    peft_config = None
    if case.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    gradient = _Gradient()
    torch.manual_seed(0)  # of the adapter
    make = BridgeDistillationTrainer if case.bridge else StepwiseDistillationTrainer
    trainer = make(
        str(material / case.student),
        None if case.cache else str(material / case.teacher),
        args,
        train_dataset=make_text(case.rows) if case.bridge else make_dataset(case.rows),
        processing_class=student_tokenizer(case.spaced),
        teacher_processing_class=source_tokenizer(case.spaced) if case.bridge else None,
        callbacks=[gradient],
        peft_config=peft_config,
    )
    gradient.trainer = trainer
    return trainer, gradient


def run(name: str, material: Path, output: Path, micro_batch: int, accumulation: int, **more: Any) -> dict[str, Any]:
    """Train a case; what was logged, with gradient and final weights in `output`."""
    with tempfile.TemporaryDirectory() as directory:
        trainer, gradient = make_trainer(CASES[name], Path(directory), material, micro_batch, accumulation, **more)
        watched = watch_teacher(trainer) if CASES[name].watch else {}
        trainer.train()
        if watched:
            watched["after"] = sum(_elements(parameter) for parameter in trainer.teacher.parts.model.parameters())
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if CASES[name].weights else {}
        kind = kind_of(trainer)  # FSDP leaves what an evaluation needed last whole
        # An odd number of rows, which accelerate fills up with others.
        metrics = trainer.evaluate(trainer.train_dataset) if CASES[name].weights else {}
    if PartialState().is_main_process:
        save_file(gradient.values, output.with_suffix(".gradient.safetensors"))
        if state:
            save_file(
                {name: value.float().cpu().clone() for name, value in state.items()},
                output.with_suffix(".weights.safetensors"),
            )
    norm = torch.stack([value.double().square().sum() for value in gradient.values.values()]).sum().sqrt()
    found = {"kind": kind, "processes": trainer.accelerator.num_processes, "norm": float(norm)}
    if watched:
        found["teacher"] = watched
    return (
        found
        | {"loss": [entry["loss"] for entry in logged]}
        | {key: [metrics[key]] for key in ("eval_loss", "eval_divergence", "eval_align_ratio") if key in metrics}
        | {
            key: [entry[key] for entry in logged]
            for key in ("divergence", "hidden_loss", "num_tokens", "align_ratio", "span_ratio")
            if key in logged[0]
        }
    )


def watch_teacher(trainer: Any) -> dict[str, int]:
    """Elements of the teacher that lie on this process: before training, and at most while a layer runs."""
    teacher = trainer.teacher.parts.model
    values = {"total": sum(getattr(p, "ds_numel", p.numel()) for p in teacher.parameters())}
    layers = decoder_layers(teacher)
    values["layer"] = sum(getattr(p, "ds_numel", p.numel()) for p in layers[0].parameters())
    head = teacher.get_output_embeddings().weight
    values["head"] = getattr(head, "ds_numel", head.numel())

    def here() -> int:
        return sum(_elements(parameter) for parameter in teacher.parameters())

    values |= {"resident": here(), "peak": 0, "calls": 0}

    def note(*_: Any) -> None:
        values["peak"] = max(values["peak"], here())
        values["calls"] += 1

    for layer in layers:
        layer.register_forward_pre_hook(note)  # behind the hooks that gather its weights
    return values


def _elements(parameter: Any) -> int:
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    shard = parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else 0
    return parameter.numel() + shard


def allow_fsdp_on_cpu() -> None:
    """
    Let accelerate use FSDP in processes on CPUs: it looks for the plugin only in those that were started for GPUs.
    Each `TrainingArguments` makes the state anew.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    initialize = PartialState.__init__

    def initialize_for_fsdp(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = initialize_for_fsdp  # type: ignore[method-assign]


def kind_of(trainer: Any) -> str:
    """What really splits the student, read from its wrapper and its parameters rather than from the options."""
    wrapped = trainer.model_wrapped
    if hasattr(wrapped, "zero_optimization_stage"):
        return f"zero{wrapped.zero_optimization_stage()}"
    if isinstance(wrapped, DistributedDataParallel):
        return "ddp"
    sharded = [isinstance(parameter, DTensor) for parameter in wrapped.parameters()]
    return "fsdp2" if all(sharded) else "mixed" if any(sharded) else "single"


def main(path: Path) -> int:
    plan = json.loads(path.read_text())
    allow_fsdp_on_cpu()
    gc.freeze()  # what is imported; accelerate collects after every training
    results = {}
    for label, (name, micro_batch, accumulation, more) in plan["runs"].items():
        started = time.perf_counter()
        results[label] = run(
            name, Path(plan["material"]), Path(plan["output"]) / label, micro_batch, accumulation, **more
        )
        results[label]["seconds"] = time.perf_counter() - started
        if PartialState().is_main_process:
            print(label, results[label], flush=True)
    if PartialState().is_main_process:
        (Path(plan["output"]) / "results.json").write_text(json.dumps(results, indent=1))
    PartialState().wait_for_everyone()
    return 0


if __name__ == "__main__":
    run_and_end(lambda: main(Path(sys.argv[1])))
