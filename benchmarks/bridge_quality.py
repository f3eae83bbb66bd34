"""
What a source of another tokenizer is worth to a small student: the numbers of docs/bridge.md.

    python benchmarks/bridge_quality.py --gpt2_tokenizer GPT2_DIR --gemma GEMMA_DIR --work runs/bridge
    python benchmarks/bridge_quality.py --work runs/bridge --table --figure docs/images/bridge.png

Two pairs of a source and a student: smollm2-gpt2, SmolLM2-135M and a student with GPT-2's vocabulary transplanted by
means; gemma-smollm2, Gemma-3-270M and a student with SmolLM2's vocabulary. The student is a few of SmolLM2's 30
layers, after --warm_up_steps of cross-entropy on rows that nothing else uses, 0 by default. The source is as it
was published, or, as in the paper, after --source_steps of cross-entropy on the training rows. Each arm trains the
same start on the same rows of Dolly in the same order, with the same batches and AdamW:

    cross_entropy     no source
    sequence          cross-entropy on answers to the same prompts that the source has sampled
    uld, overlap_kl, alm, mined
                      these methods of BridgeDistillationConfig with half the weight, the other half cross-entropy;
                      `_only` behind: no cross-entropy; alm_spans: alm of single spans, without alm_debias
    gold, gold_hybrid TRL's GOLDTrainer with its default options for two tokenizers, and its hybrid loss; it takes
                      byte-level tokenizers only, so for smollm2-gpt2

Each arm's learning rate is that of `--rates` with the fewest bits per byte of validation rows after shorter runs with
the first seed. Measured are, at a quarter, half, three quarters and the end of a run, bits per byte of test answers
given their prompts, and at the end Rouge-L of greedy answers. Seconds do not count these measurements. Runs read the
source from a cache of its 64 likeliest tokens, made once; the seconds of a step with the source itself are measured
in separate short runs. Where the source's answers are longer than the data's, the table has bits per byte after as
many tokens, not rows. Equal time is that which cross-entropy takes for all its steps: every arm's bits per byte then,
by linear interpolation, with the seconds of the source itself and with those of the cache. The seconds in which the
cache was made, and in which the source answered the prompts, are not in them, and stand below the table. With --clock
cpu seconds are those of the process, which one thread (OMP_NUM_THREADS=1) spends where other work shares the machine.

Results are kept in --work after every run, and what is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from bridge_runs import ARMS, GOLD, OURS, SMOLLM2, Pair, Rows, bits_per_byte, load_rows, rouge_l, run_one
from datasets.utils.logging import disable_progress_bar
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from cbd_hf.data.instructions import DOLLY
from cbd_hf.tokenization.rows import alignment_statistics
from cbd_hf.tokenization.vocabulary import VocabularyMap


READS_CACHE = [arm for arm, options in OURS.items() if options is not None]
CONSTANT = "constant_with_warmup"
PAIRS = ["smollm2-gpt2", "gemma-smollm2"]
DEFAULT_ARMS = ["cross_entropy", "sequence", "uld", "overlap_kl", "alm", "gold", "gold_hybrid"]
# Options without which results cannot be compared.
SETTINGS = [
    "answer_tokens",
    "batch_size",
    "clock",
    "layers",
    "max_tokens",
    "min_completion",
    "prompts",
    "rate_steps",
    "rate_warm_up",
    "schedule",
    "source_rate",
    "source_steps",
    "steps",
    "test_rows",
    "train_rows",
    "validation_rows",
    "warm_up_rate",
    "warm_up_steps",
]
COLUMNS = [
    "arm",
    "learning rate",
    "bits per byte, equal tokens",
    "less cross_entropy's, by seed",
    "bits per byte, equal time",
    "equal time, cached",
    "Rouge-L",
    "seconds of a step",
    "cached",
]
COLORS = {
    "cross_entropy": "#222222",
    "sequence": "#888888",
    "uld": "#c8553d",
    "overlap_kl": "#0b6e4f",
    "alm": "#3d5a80",
    "alm_spans": "#98b4d4",
    "mined": "#8a5a9e",
    "gold": "#d9a404",
    "gold_hybrid": "#a0762a",
}


class Results:
    """results.json: what is known of runs, by name."""

    def __init__(self, directory: Path, settings: dict[str, Any] | None) -> None:
        self.path = directory / "results.json"
        self.content: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        known = self.content.setdefault("settings", settings or {})
        different = [name for name, value in (settings or known).items() if known.get(name) != value]
        if different:
            raise ValueError(f"{self.path} was made with other {', '.join(different)}: choose another --work.")

    def get(self, name: str, make: Any) -> Any:
        """What is known by this name, or what `make()` says."""
        if name not in self.content:
            self.content[name] = make()
            self.path.write_text(json.dumps(self.content, indent=1))
            print(name, shown(self.content[name]), flush=True)
        return self.content[name]

    def best_rate(self, pair: str, arm: str) -> float | None:
        """The learning rate with the fewest bits per byte of validation rows."""
        tried = {}
        for name, result in self.content.items():
            if name.startswith(f"{pair} {arm} ") and name.endswith(" search"):
                tried[float(name.split()[2])] = result["points"][-1]["bits_per_byte"]
        return min(tried, key=lambda rate: tried[rate]) if tried else None

    def runs(self, pair: str, arm: str) -> list[dict[str, Any]]:
        """At that learning rate, by seed."""
        rate = self.best_rate(pair, arm)
        return (
            []
            if rate is None
            else [
                self.content[name]
                for seed in range(100)
                if (name := f"{pair} {arm} {rate:g} seed {seed}") in self.content
            ]
        )


def shown(result: dict[str, Any]) -> str:
    parts = []
    for name, value in result.items():
        if name == "points":
            parts.append("bits per byte " + " ".join(f"{point['bits_per_byte']:.4f}" for point in value))
        elif name == "seconds":
            parts.append(f"{sum(value):.1f} s")
        elif isinstance(value, dict):
            parts.append(shown(value))
        else:
            parts.append(f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} {value}")
    return "  ".join(parts)


def reference(pair: Pair, rows: Rows) -> dict[str, Any]:
    """What is true before any run."""
    args, test = pair.args, pair.prepared(rows.test)
    answered = rows.test.select(range(args.prompts))
    shared = VocabularyMap.from_tokenizers(pair.tokenizer, pair.source_tokenizer).coverage()
    result: dict[str, Any] = {f"coverage_{side}": share for side, share in shared.items()}
    result |= alignment_statistics(pair.train)
    result["tokens_per_row"] = statistics.mean(map(len, pair.train["input_ids"]))
    for name, path in (("cut", pair.cut), ("start", pair.start)):
        model = AutoModelForCausalLM.from_pretrained(path)
        result[f"bits_{name}"] = bits_per_byte(model, test, rows.test, pair.tokenizer)
    result["rouge_start"] = rouge_l(model, pair.tokenizer, answered, args)
    result["bits_source"] = bits_per_byte(pair.source_model, test, rows.test, pair.source_tokenizer, "source_")
    result["rouge_source"] = rouge_l(pair.source_model, pair.source_tokenizer, answered, args)
    if args.source_steps:
        result["source_trained_in"] = float((pair.directory / "source_seconds").read_text())
    return result


def arms_of(pair: str, args: argparse.Namespace) -> list[str]:
    return [arm for arm in args.arms if arm not in GOLD or pair == "smollm2-gpt2"]


def run_all(args: argparse.Namespace, results: Results) -> None:
    rows = load_rows(args)
    pairs = {name: Pair(name, args, rows) for name in args.pairs}
    for seed in range(args.seeds):
        for name, pair in pairs.items():
            results.get(f"{name} reference", lambda pair=pair: reference(pair, rows))
            for arm in arms_of(name, args):
                one_arm(pair, arm, seed, results, rows)


def one_arm(pair: Pair, arm: str, seed: int, results: Results, rows: Rows) -> None:
    """The learning rate and the seconds of a step, with the first seed; then the run."""
    args, name = pair.args, pair.directory.name

    def search(rate: float) -> Any:
        return run_one(pair, arm, rate, 0, args.rate_steps, rows=rows.validation, answer=False)

    def answers() -> Any:
        made, seconds = pair.answers
        return {"made_in": seconds, "tokens_per_row": statistics.mean(map(len, made["input_ids"]))}

    for rate in args.rates:
        results.get(f"{name} {arm} {rate:g} search", lambda rate=rate: search(rate))
    rate = results.best_rate(name, arm)
    results.get(
        f"{name} {arm} timing",
        lambda: run_one(pair, arm, rate, 0, args.timing_steps + 1, rows=None, answer=False, live=True),
    )
    if arm in READS_CACHE:
        results.get(f"{name} cache", lambda: {"made_in": pair.cache[1]})
    if arm == "sequence":
        results.get(f"{name} answers", answers)
    results.get(
        f"{name} {arm} {rate:g} seed {seed}",
        lambda: run_one(pair, arm, rate, seed, args.steps, rows=rows.test, answer=True),
    )


def step_seconds(results: Results, pair: str, arm: str) -> float:
    """Of a step with the source itself; the first is left out, in which memory is claimed."""
    return statistics.mean(results.content[f"{pair} {arm} timing"]["seconds"][1:])


def curve(run: dict[str, Any], start: float) -> tuple[np.ndarray, np.ndarray]:
    """Steps and bits per byte there, from step 0."""
    points = [{"step": 0, "bits_per_byte": start}, *run["points"]]
    return np.array([point["step"] for point in points]), np.array([point["bits_per_byte"] for point in points])


def tokens_per_row(results: Results, pair: str, arm: str) -> float:
    """That the student reads; the source's answers are longer or shorter than the data's."""
    return float(results.content[f"{pair} {'answers' if arm == 'sequence' else 'reference'}"]["tokens_per_row"])


def at_step(run: dict[str, Any], start: float, steps: float) -> float:
    """Bits per byte after so many steps, by linear interpolation; of the whole run if it has fewer."""
    known, bits = curve(run, start)
    return float(np.interp(steps, known, bits))


def cached_seconds(runs: list[dict[str, Any]]) -> float:
    """Of a step that reads the source from the cache; the median, since runs share the machine."""
    return statistics.median(second for run in runs for second in run["seconds"])


def spread(values: list[float], digits: int, sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"


def table(results: Results, args: argparse.Namespace) -> str:
    """Markdown; mean and standard deviation over the seeds."""
    lines = []
    for pair in args.pairs:
        known = results.content.get(f"{pair} reference")
        arms = [arm for arm in ARMS if results.runs(pair, arm)]
        if known is None or "cross_entropy" not in arms:
            continue
        lines += [f"### {pair}", "", shown(known), ""]
        # A rate that falls to 0 says nothing of less training, nor of as many tokens in fewer rows.
        ends_only = results.content["settings"]["schedule"] != CONSTANT
        columns = [name for name in COLUMNS if not (ends_only and "equal time" in name)]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        plain = results.runs(pair, "cross_entropy")
        budget = len(plain[0]["seconds"]) * step_seconds(results, pair, "cross_entropy")
        for arm in arms:
            runs = results.runs(pair, arm)
            tokens = 1.0 if ends_only else known["tokens_per_row"] / tokens_per_row(results, pair, arm)
            ends = [at_step(run, known["bits_start"], tokens * len(run["seconds"])) for run in runs]
            seconds = step_seconds(results, pair, arm)
            cached = cached_seconds(runs) if arm in READS_CACHE else None
            others = [run["points"][-1]["bits_per_byte"] for run in plain]
            cells = [
                arm,
                f"{results.best_rate(pair, arm):g}",
                spread(ends, 4),
                spread([one - other for one, other in zip(ends, others, strict=False)], 4, "+"),
                spread([at_step(run, known["bits_start"], budget / seconds) for run in runs], 4),
                spread([at_step(run, known["bits_start"], budget / cached) for run in runs], 4) if cached else "",
                spread([run["rouge_l"] for run in runs], 2),
                f"{seconds:.2f}",
                f"{cached:.2f}" if cached else "",
            ]
            shown_cells = [cell for cell, name in zip(cells, COLUMNS, strict=True) if name in columns]
            lines.append(f"| {' | '.join(shown_cells)} |")
        made = {"the cache": f"{pair} cache", "the source's answers": f"{pair} answers"}
        notes = [
            f"{what}: {results.content[key]['made_in']:.0f} s" for what, key in made.items() if key in results.content
        ]
        logged = [results.runs(pair, arm)[0]["logged"] for arm in arms]
        lines += ["", "; ".join(notes), "", shown(next((entry for entry in logged if entry), {})), ""]
    return "\n".join(lines)


def plot(results: Results, args: argparse.Namespace) -> None:
    """Bits per byte against tokens and against seconds: mean, and band of a standard deviation over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = [pair for pair in args.pairs if any(results.runs(pair, arm) for arm in COLORS)]
    if not pairs:
        raise ValueError(f"{results.path} has no finished run to draw.")
    figure, panels = plt.subplots(len(pairs), 2, figsize=(11, 4.2 * len(pairs)), squeeze=False, layout="constrained")
    batch = results.content["settings"]["batch_size"]
    for (left, right), pair in zip(panels, pairs, strict=True):
        known = results.content[f"{pair} reference"]
        for arm in COLORS:
            runs = results.runs(pair, arm)
            if not runs:
                continue
            curves = [curve(run, known["bits_start"]) for run in runs]
            steps, bits = curves[0][0], np.stack([bits for _, bits in curves])
            tokens = batch * tokens_per_row(results, pair, arm)
            middle, width = bits.mean(0), bits.std(0, ddof=1) if len(runs) > 1 else 0 * bits[0]
            for panel, scale in ((left, tokens / 1000), (right, step_seconds(results, pair, arm))):
                panel.plot(steps * scale, middle, color=COLORS[arm], marker="o", markersize=3, label=arm)
                panel.fill_between(steps * scale, middle - width, middle + width, color=COLORS[arm], alpha=0.15)
        left.set(title=pair, xlabel="training tokens (thousand)", ylabel="bits per byte of test answers")
        right.set(title=pair, xlabel="seconds of training, the source run in every step")
        for panel in (left, right):
            panel.grid(alpha=0.3)
        right.legend(fontsize=8)
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bridge_quality"), help="students, caches, results")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=DEFAULT_ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--gpt2_tokenizer", default="gpt2", help="directory or Hub id")
    parser.add_argument("--gemma", default="google/gemma-3-270m", help="directory or Hub id")
    parser.add_argument("--dolly", default=DOLLY, help="file or Hub id")
    parser.add_argument("--layers", type=int, default=6, help=f"of {SMOLLM2} that the student keeps")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate_steps", type=int, default=12, help="of the runs that choose the learning rate")
    parser.add_argument("--timing_steps", type=int, default=4)
    parser.add_argument("--warm_up_steps", type=int, default=0, help="of the training before all arms; 0: none")
    parser.add_argument("--warm_up_rate", type=float, default=1e-3)
    parser.add_argument("--source_steps", type=int, default=0, help="of the source on the training rows, before all")
    parser.add_argument("--source_rate", type=float, default=3e-5)
    parser.add_argument("--rate_warm_up", type=int, default=4, help="steps in which the learning rate rises")
    parser.add_argument(
        "--schedule", choices=[CONSTANT, "linear"], default=CONSTANT, help="linear falls to 0, and compares ends only"
    )
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_tokens", type=int, default=80, help="of prompt and answer, as SmolLM2 counts")
    parser.add_argument("--min_completion", type=int, default=8, help="least tokens of an answer")
    parser.add_argument("--train_rows", type=int, default=192)
    parser.add_argument("--validation_rows", type=int, default=24)
    parser.add_argument("--test_rows", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=32, help="test prompts that are answered")
    parser.add_argument("--answer_tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="wall")
    parser.add_argument("--quick", action="store_true", help="see that it runs: 4 steps, one seed, one rate")
    parser.add_argument("--table", action="store_true", help="print the table of what is in --work, and train nothing")
    parser.add_argument("--figure", type=Path, help="draw what is in --work, and train nothing")
    args = parser.parse_args()
    if args.quick:
        small = {"steps": 4, "rate_steps": 2, "timing_steps": 1, "warm_up_steps": 2, "seeds": 1, "rates": [3e-4]}
        vars(args).update(small, train_rows=32, validation_rows=8, test_rows=8, prompts=4, answer_tokens=8)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.table or args.figure:
        results = Results(args.work, None)
        if args.table:
            print(table(results, args))
        if args.figure:
            plot(results, args)
        return
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
    results = Results(args.work, {name: getattr(args, name) for name in SETTINGS})
    run_all(args, results)
    print(table(results, args))


if __name__ == "__main__":
    main()
