"""Random prepared rows, tiny models and tokenizers of two families, and trainers of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cbd_hf.distillation.bridge.config import BridgeDistillationConfig
from cbd_hf.distillation.bridge.spans import Alignment
from cbd_hf.distillation.bridge.trainer import BridgeDistillationTrainer
from cbd_hf.distillation.student import PROJECTION, HiddenProjection
from cbd_hf.tokenization.rows import COLUMNS

from ...models import random_model, tiny_config
from ...tokenization.chats import CHATML, GEMMA, chat_tokenizer, turn
from ...tokenization.tokenizers import CORPUS
from ..helpers import Observer
from .plain import expected_loss


def random_row(rng: random.Random, spans: int | None = None) -> dict[str, list[int]]:
    """A prepared row: prompts that are not supervised, spans of 1 to 3 tokens, and supervised tokens between them."""
    row: dict[str, list[int]] = {name: [] for name in COLUMNS}

    def add(side: str, size: int, supervised: bool, span: int = -1) -> None:
        for _ in range(size):
            token = rng.randrange(4, 60)
            row[side + "input_ids"].append(token)
            row[side + "labels"].append(token if supervised else -100)
            row[side + "spans"].append(span)

    for side in ("", "source_"):
        add(side, rng.randint(1, 6), False)
    for span in range(rng.randint(0, 6) if spans is None else spans):
        for side in ("", "source_"):
            add(side, rng.choice([0, 0, 1, 2]), rng.random() < 0.7)
            add(side, rng.randint(1, 3), True, span)
    for side in ("", "source_"):
        add(side, rng.choice([0, 1, 3]), rng.random() < 0.7)
    return row


def padded(rows: list[dict[str, list[int]]], widths: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """A batch of prepared rows, each side padded on the right to its own length or to a given one."""
    batch: dict[str, torch.Tensor] = {}
    for number, side in enumerate(("", "source_")):
        lengths = [len(row[side + "input_ids"]) for row in rows]
        width = max(lengths) if widths is None else widths[number]
        for name, filler in (("input_ids", 0), ("labels", -100), ("spans", -1)):
            values = np.full((len(rows), width), filler)
            for index, row in enumerate(rows):
                values[index, : lengths[index]] = row[side + name]
            batch[side + name] = torch.from_numpy(values)
        batch[side + "attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return batch


def random_batch(rng: random.Random, rows: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """A padded batch and its rows; the second row has no span, the third no supervised token."""
    made = [random_row(rng, 0 if index == 1 else None) for index in range(rows)]
    for side in ("", "source_"):
        made[2][side + "labels"] = [-100] * len(made[2][side + "labels"])
        made[2][side + "spans"] = [-1] * len(made[2][side + "spans"])
    return padded(made), made


def student_tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer("byte_level", CHATML)


def source_tokenizer() -> PreTrainedTokenizerFast:
    """With low lines for spaces, byte fallback, and BOS in front of texts."""
    return chat_tokenizer("metaspace", GEMMA, bos=True)


def rows_of(tokenizer: PreTrainedTokenizerFast, more: int) -> int:
    """Rows of an embedding with some behind the tokens."""
    return max(tokenizer.get_vocab().values()) + 1 + more


def student_model(layers: int = 1, **options: Any) -> PreTrainedModel:
    config = tiny_config(
        "llama", layers, **{"vocab_size": rows_of(student_tokenizer(), 3), "max_position_embeddings": 256} | options
    )
    return random_model(config, seed=1, std=0.1)


def source_model(layers: int = 2, **options: Any) -> PreTrainedModel:
    config = tiny_config(
        "gpt2", layers, heads=6, **{"vocab_size": rows_of(source_tokenizer(), 5), "n_positions": 256} | options
    )
    return random_model(config, seed=2, std=0.2)


def passage(rng: random.Random, most: int) -> str:
    """Some words of what the tokenizers were trained on."""
    words = rng.choice(CORPUS[:8]).split(" ")
    first = rng.randrange(len(words))
    return " ".join(words[first : first + rng.randint(1, most)])


def make_dataset(kind: str = "answers", rows: int = 12, seed: int = 0) -> Dataset:
    """`"text"`, `"answers"` or `"messages"`, of uneven lengths."""
    rng = random.Random(seed)
    if kind == "text":
        return Dataset.from_list([{"text": f"{passage(rng, 9)} {passage(rng, 4)}"} for _ in range(rows)])
    if kind == "answers":
        return Dataset.from_list(
            [{"prompt": passage(rng, 5) + ":", "completion": " " + passage(rng, 9)} for _ in range(rows)]
        )
    return Dataset.from_list(
        [
            {
                "messages": [
                    turn(role, passage(rng, 6)) for _ in range(rng.randint(1, 2)) for role in ("user", "assistant")
                ]
            }
            for _ in range(rows)
        ]
    )


def make_config(directory: Path, **options: Any) -> BridgeDistillationConfig:
    return BridgeDistillationConfig(
        **{
            "output_dir": str(directory / "trainer"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "report_to": "none",
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "cross_entropy_weight": 0.3,
        }
        | options
    )


_MODELS = (
    "data_collator",
    "eval_dataset",
    "callbacks",
    "peft_config",
    "formatting_func",
    "processing_class",
    "teacher_processing_class",
)


def make_trainer(
    directory: Path,
    dataset: Any = None,
    student: PreTrainedModel | str | None = None,
    source: PreTrainedModel | str | None = None,
    **options: Any,
) -> BridgeDistillationTrainer:
    """Of tiny models on rows with prompts; a source of `options["teacher_cache"]` needs no model."""
    if source is None and "teacher_cache" not in options:
        source = source_model()
    given = {name: options.pop(name) for name in _MODELS if name in options}
    return BridgeDistillationTrainer(
        student_model() if student is None else student,
        source,
        make_config(directory, **options),
        train_dataset=make_dataset() if dataset is None else dataset,
        **{"processing_class": student_tokenizer(), "teacher_processing_class": source_tokenizer()} | given,
    )


def train(directory: Path, **options: Any) -> tuple[list[float], list[dict[str, torch.Tensor]], Any]:
    """Losses and gradients of every step, and the trainer."""
    observer = Observer()
    trainer = make_trainer(directory, callbacks=[observer], **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, observer.gradients, trainer


def plain_step(
    trainer: BridgeDistillationTrainer,
    rows: Any,
    student: PreTrainedModel,
    source: PreTrainedModel,
    pairs: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """
    Loss and gradients over prepared rows, each read alone and by itself, in float64.

    Args:
        trainer ([`BridgeDistillationTrainer`]): for its options and its vocabularies.
        rows (`Iterable[dict]`): prepared.
        student, source (`PreTrainedModel`): as the trainer got them.
        pairs (`Sequence[tuple[int, int]]`, *optional*): layers to match.

    Returns:
        `dict`: `loss`, `divergence` and `hidden_loss` per supervised token, `gradient` of the loss.
    """
    args = trainer.args
    student, source = student.double(), source.double()
    projection = HiddenProjection(student.config.hidden_size, source.config.hidden_size, len(pairs), seed=args.seed)
    if pairs:
        student.add_module(PROJECTION, projection.double())
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    for row in rows:
        outputs, chosen = [], []
        for side, model in (("", student), ("source_", source)):
            outputs.append(model(input_ids=torch.tensor([row[side + "input_ids"]]), output_hidden_states=True))
            chosen.append([i for i, label in enumerate(row[side + "labels"][1:]) if label != -100])
        own, others = (
            torch.tensor([row[side + "spans"][i + 1] for i in where])
            for side, where in zip(("", "source_"), chosen, strict=True)
        )
        labels, source_labels = (
            torch.tensor([row[side + "labels"][i + 1] for i in where])
            for side, where in zip(("", "source_"), chosen, strict=True)
        )
        follows = (torch.tensor([i + 1 in where for i in where], dtype=torch.bool) for where in chosen)
        alignment = Alignment(own, others, source_labels, max(row["spans"]) + 1, *follows)
        total, part = expected_loss(
            outputs[0].logits[0][chosen[0]],
            outputs[1].logits[0][chosen[1]].detach(),
            labels,
            alignment,
            trainer._student_loss.vocabularies,  # type: ignore[attr-defined]
            args.make_span_objective(),
        )
        distance = torch.zeros((), dtype=torch.float64)
        for matrix, layers in zip(projection.layers, pairs, strict=True):
            for span in range(alignment.count):
                mine, theirs = (
                    output.hidden_states[layer][0, where[numbers.tolist().index(span)]]
                    for output, layer, where, numbers in zip(outputs, layers, chosen, (own, others), strict=True)
                )
                distance = distance + (matrix.weight @ mine - theirs.detach()).square().mean() / len(pairs)
        sums = sums + torch.stack([total + args.hidden_loss_weight * distance, part, distance])
        count += len(labels)
    (sums[0] / count).backward()
    names = ("loss", "divergence", "hidden_loss")
    return {name: float(value) / count for name, value in zip(names, sums.detach(), strict=True)} | {
        "gradient": {name: p.grad.float() for name, p in student.named_parameters() if p.grad is not None}
    }
