"""
On-policy distillation by policy gradient against its rivals, at equal optimizer steps: the table of docs/minillm.md.

    python benchmarks/minillm.py path/to/stories260k

The teacher is stories260K (by default looked for in $CBD_TEST_DATA/models/stories260k), the student its first and
last layer after off-policy training on the teacher's stories that all arms share (--warm-up): by default until it
brings little more, as MiniLLM, too, starts from a tuned student. Then every arm takes the same number of steps
on as many rows and sees each of the same prompts four times: stepwise distillation on the teacher's stories
(off-policy), MiniLLM, stepwise distillation on the student's own samples (on-policy, lmbda=1), and MiniLLM without its
policy term at MiniLLM's learning rate. The other learning rates are the best of three on validation prompts, by the
mean over all seeds, and of more if the best lies at an end. Measured on other held-out prompts: the reverse KL
divergence per token of the student's own samples, exact at every position and as a Monte Carlo estimate of whole
sequences, and the student's loss on the teacher's stories. Prints one line per run, differences by seed and a Markdown
table; about half an hour on a core.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cbd_hf import MiniLLMConfig, MiniLLMTrainer, StepwiseDistillationConfig, StepwiseDistillationTrainer
from cbd_hf.distillation.on_policy import sample_completions


PROMPT, ANSWER, BATCH = 8, 32, 32
ROLLOUT: dict[str, Any] = {"rollout_batch_size": 256, "inner_epochs": 4, "generation_batch_size": 256}
ARMS: dict[str, dict[str, Any]] = {
    "off-policy": {},
    "MiniLLM": ROLLOUT,
    "on-policy (lmbda=1)": {"lmbda": 1.0},
    "MiniLLM, no policy term": ROLLOUT | {"policy_weight": 0.0},
}
RATES = [5e-4, 1e-3, 2e-3]


def generate(model: PreTrainedModel, prompts: list[list[int]], tokens: int, seed: str) -> list[list[int]]:
    """Sampled completions of exactly `tokens` tokens; equal prompts get their own by their place."""
    options: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 1.0, "pad_token_id": 0, "eos_token_id": None}
    found = []
    with torch.no_grad():
        for start in range(0, len(prompts), 512):
            part = prompts[start : start + 512]
            keys = [str(start + row) for row in range(len(part))]
            found += sample_completions(model, part, seed=seed, keys=keys, **options)
    return found


def stories(teacher: PreTrainedModel, rows: int, seed: str) -> list[list[int]]:
    start = [[teacher.config.bos_token_id]] * rows
    return [[teacher.config.bos_token_id, *row] for row in generate(teacher, start, PROMPT + ANSWER - 1, seed)]


def as_dataset(rows: list[list[int]]) -> Dataset:
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]} for row in rows])


@torch.no_grad()
def log_probs(model: PreTrainedModel, rows: list[list[int]]) -> torch.Tensor:
    """Of the whole vocabulary at the answers' tokens; float32, shape (rows, ANSWER, vocab)."""
    parts = torch.tensor(rows).split(256)
    logits = torch.cat([model(input_ids=part, use_cache=False).logits[:, PROMPT - 1 : -1] for part in parts])
    return F.log_softmax(logits.float(), dim=-1)


def measure(student: PreTrainedModel, teacher: PreTrainedModel, rows: list[list[int]], seed: str) -> dict[str, float]:
    student.eval()
    prompts = [row[:PROMPT] for row in rows]
    answers = generate(student, prompts, ANSWER, seed)
    samples = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    q, p = log_probs(student, samples), log_probs(teacher, samples)
    tokens = torch.tensor(answers)[..., None]
    loss = log_probs(student, rows).gather(-1, torch.tensor(rows)[:, PROMPT:, None])
    return {
        "exact": float((q.exp() * (q - p)).sum(-1).mean()),
        "sampled": float((q - p).gather(-1, tokens).mean()),
        "loss": -float(loss.mean()),
    }


def train(
    start: dict[str, torch.Tensor],
    config: Any,
    teacher: PreTrainedModel,
    tokenizer: Any,
    rows: list[list[int]],
    **o: Any,
) -> PreTrainedModel:
    student = AutoModelForCausalLM.from_config(config)
    student.load_state_dict(start)
    minillm = "rollout_batch_size" in o
    with tempfile.TemporaryDirectory() as directory:
        options = {
            "output_dir": directory,
            "per_device_train_batch_size": BATCH,
            "max_new_tokens": ANSWER,
            "warmup_steps": 10,
            "logging_steps": 10_000,
            "save_strategy": "no",
            "report_to": "none",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        args = (MiniLLMConfig if minillm else StepwiseDistillationConfig)(**options | o)
        trainer = (MiniLLMTrainer if minillm else StepwiseDistillationTrainer)(
            student, teacher, args, train_dataset=as_dataset(rows), processing_class=tokenizer
        )
        trainer.train()
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("CBD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("model", nargs="?", default=str(data / "models" / "stories260k"))
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--warm-up", type=int, default=1000, help="steps of off-policy training that all arms share")
    parser.add_argument("--warm-up-epochs", type=int, default=4, help="times that these see each of their stories")
    parser.add_argument("--warm-up-rate", type=float, default=4e-3)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates to begin the search with"
    )
    parser.add_argument("--held-out", type=int, default=2048, help="prompts of the table; half as many for validation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="to run some by themselves")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    disable_progress_bars()
    teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    began = time.monotonic()
    warm = stories(teacher, BATCH * arguments.warm_up // arguments.warm_up_epochs, "warm-up")
    rows = stories(teacher, BATCH * arguments.steps // ROLLOUT["inner_epochs"], "train")
    validation = stories(teacher, arguments.held_out // 2, "validation")
    test = stories(teacher, arguments.held_out, "test")
    print(f"{len(warm) + len(rows):,} stories of the teacher in {time.monotonic() - began:.0f} s", flush=True)

    config = type(teacher.config).from_dict(teacher.config.to_dict() | {"num_hidden_layers": 2})
    student = AutoModelForCausalLM.from_config(config)
    state, last = teacher.state_dict(), teacher.config.num_hidden_layers - 1
    for name in student.state_dict():
        parts = name.split(".")
        if parts[1] == "layers":
            state[name] = teacher.state_dict()[".".join([*parts[:2], str(last * int(parts[2])), *parts[3:]])]
    start = {name: state[name] for name in student.state_dict()}
    options = {"max_steps": arguments.warm_up, "learning_rate": arguments.warm_up_rate, "seed": 0}
    student = train(start, config, teacher, tokenizer, warm, **options)
    start = {name: value.clone() for name, value in student.state_dict().items()}

    def run(arm: str, rate: float, seed: int) -> dict[str, float]:
        began = time.monotonic()
        options = ARMS[arm] | {"max_steps": arguments.steps, "learning_rate": rate, "seed": seed}
        student = train(start, config, teacher, tokenizer, rows, **options)
        seconds = time.monotonic() - began
        result = {"validation": measure(student, teacher, validation, f"validation {seed}")["exact"]}
        result |= measure(student, teacher, test, f"test {seed}") | {"seconds": seconds}
        values = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        print(f"{arm}, learning rate {rate:g}, seed {seed}: {values}", flush=True)
        return result

    def row(arm: str, rate: str, results: list[dict[str, float]]) -> str:
        cells = [arm, rate]
        for name in ("exact", "sampled", "loss"):
            values = [result[name] for result in results]
            cells.append(f"{mean(values):.4f} ± {stdev(values) if len(values) > 1 else 0:.4f}")
        cells.append(f"{mean(result['seconds'] for result in results):.0f}" if rate else "")
        return f"| {' | '.join(cells)} |"

    lines = ["| arm | learning rate | reverse KL, exact | reverse KL, sampled | loss on stories | seconds |"]
    lines.append("|---|---|---|---|---|---|")
    before = [measure(student, teacher, test, f"test {seed}") for seed in range(arguments.seeds)]
    lines.append(row("after the warm-up", "", before))
    chosen_rates: dict[str, float] = {}
    exact: dict[str, list[float]] = {}
    for arm in arguments.arms:
        tuned = "policy_weight" in ARMS[arm] and "MiniLLM" in chosen_rates
        rates = [chosen_rates["MiniLLM"]] if tuned else list(arguments.rates)
        tried: dict[float, list[dict[str, float]]] = {}
        while rates:
            tried |= {rate: [run(arm, rate, seed) for seed in range(arguments.seeds)] for rate in rates}
            best = min(tried, key=lambda rate: mean(result["validation"] for result in tried[rate]))
            ends = {} if len(tried) == 1 else {min(tried): best / 2, max(tried): best * 2}
            rates = [ends[best]] if best in ends else []
        chosen_rates[arm] = best
        lines += [row(arm, f"{rate:g}{', chosen' * (rate == best)}", tried[rate]) for rate in sorted(tried)]
        exact[arm] = [result["exact"] for result in tried[best]]
        if "off-policy" in exact and arm != "off-policy":
            pairs = zip(exact[arm], exact["off-policy"], strict=True)
            print(f"{arm} less off-policy, by seed:", *(f"{one - other:+.4f}" for one, other in pairs), flush=True)
        print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()
