"""
Train a few steps of stepwise distillation on random models and write the peak of this process's memory to a JSON file
named by its rank: bytes above what it had before the models were made.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from cbd_hf import StepwiseDistillationConfig, StepwiseDistillationTrainer
from cbd_hf._ending import run_and_end
from cbd_hf.distillation.stages import own_deepspeed
from tests.models import tiny_config, tiny_tokenizer


def status(name: str) -> int:
    """An entry of /proc/self/status in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def reset_peak() -> None:
    """Let VmHWM start again from what is resident now; `ru_maxrss` starts at the parent's."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


class Phases(TrainerCallback):
    """Peak of each phase of a step: forward and backward, and the optimizer's step; of all steps behind the first."""

    def __init__(self, baseline: int) -> None:
        self.baseline = baseline
        self.peaks: dict[str, int] = {}

    def _end(self, phase: str, step: int) -> None:
        if step:  # the first one allocates the optimizer's state
            self.peaks[phase] = max(self.peaks.get(phase, 0), status("VmHWM") - self.baseline)
            self.peaks["resident after " + phase] = status("VmRSS") - self.baseline
        reset_peak()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end("rest", state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end("gradient", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end("update", state.global_step - 1)


WARM_UP = {"student": {"vocab_size": 64}, "teacher": {"vocab_size": 64}, "rows": 1, "length": 16}


def config_of(values: dict[str, Any]) -> Any:
    """A config of [`tiny_config`]'s families."""
    return tiny_config(**{"family": "llama", **values})


def peak(setting: dict[str, Any]) -> dict[str, int]:
    """Peaks in bytes of a setting: `student`, `teacher` (see [`config_of`]), `rows`, `length`, `options`."""
    rows, length, steps = setting["rows"], setting["length"], 3
    generator = torch.Generator().manual_seed(0)
    vocab = setting["student"]["vocab_size"]
    with tempfile.TemporaryDirectory() as directory:
        args = StepwiseDistillationConfig(
            output_dir=directory,
            per_device_train_batch_size=rows,
            max_steps=steps,
            max_length=length,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **{"gradient_checkpointing": False, **setting.get("options", {})},
        )
        tokens = torch.randint(vocab, (rows * steps * args.world_size, length), generator=generator).tolist()
        dataset = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
        own_deepspeed(args)
        gc.collect()
        baseline = status("VmRSS")
        phases = Phases(baseline)
        student, teacher = (
            AutoModelForCausalLM.from_config(config_of(setting[role]), dtype=torch.float32)
            for role in ("student", "teacher")
        )
        n_params = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters())
        trainer = StepwiseDistillationTrainer(
            student,
            teacher,
            args,
            train_dataset=dataset,
            processing_class=tiny_tokenizer(),
            callbacks=[phases],
        )
        del student, teacher
        gc.collect()
        reset_peak()
        loaded = status("VmRSS") - baseline
        trainer.train()
    peaks = phases.peaks
    return {
        "n_params": n_params,
        "baseline": baseline,
        "loaded": loaded,
        **peaks,
        "peak": max(peaks["gradient"], peaks["update"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("setting", help="JSON")
    parser.add_argument("output", type=Path, help="directory")
    values = parser.parse_args()
    torch.set_num_threads(1)
    setting = json.loads(values.setting)
    # What a first training loads and allocates for good does not belong to the models.
    peak({**WARM_UP, "options": setting.get("options", {})})
    (values.output / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peak(setting)))
    return 0


if __name__ == "__main__":
    run_and_end(main)
