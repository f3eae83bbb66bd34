"""The objectives written out in float64, tiny models and trainers, and rows labelled by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from cbd_hf import StepwiseDistillationConfig, StepwiseDistillationTrainer

from ..models import answers_dataset, random_model, tiny_config, tiny_tokenizer


EOS, USER, ASSISTANT, END, W0 = 1, 2, 3, 4, 6  # ids of tiny_tokenizer: word w<i> is W0 + i
Row = tuple[Sequence[int], Sequence[int]]  # token ids, and labels with -100 where nothing is supervised


def plain_divergence(
    p: torch.Tensor,
    q: torch.Tensor,
    objective: str = "reverse_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    head_mass: float = 0.5,
) -> torch.Tensor:
    """Of the teacher's probabilities p and the student's q, shape (positions, entries); summed over positions."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    if objective == "forward_kl":
        return kl(p, q).sum()
    if objective == "reverse_kl":
        return kl(q, p).sum()
    if objective == "generalized_jsd":
        if beta in (0, 1):  # the limits, by definition
            return (kl(q, p) if beta else kl(p, q)).sum()
        m = beta * p + (1 - beta) * q
        return (beta * kl(p, m) + (1 - beta) * kl(q, m)).sum()
    if objective == "skew_forward_kl":
        return kl(p, skew * p + (1 - skew) * q).sum()
    if objective == "skew_reverse_kl":
        return kl(q, (1 - skew) * p + skew * q).sum()
    if objective == "total_variation":
        return (p - q).abs().sum() / 2
    assert objective == "adaptive_kl"
    shares = []
    for teacher, gaps in zip(p.tolist(), (p - q).abs().tolist(), strict=True):
        mass, head = 0.0, 0.0
        for index in sorted(range(len(teacher)), key=lambda entry: -teacher[entry]):
            if mass > head_mass:
                break
            mass += teacher[index]
            head += gaps[index]
        shares.append(head / sum(gaps))
    share = torch.tensor(shares, dtype=p.dtype)
    return (share * kl(p, q) + (1 - share) * kl(q, p)).sum()


def dense_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    objective: str = "reverse_kl",
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    **options: float,
) -> torch.Tensor:
    """Sum over positions of (1 - w) T^2 D + w CE; logits of one vocabulary, shape (positions, vocab)."""
    p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum(-1, keepdim=True) for x in (teacher, student))
    divergence = temperature**2 * plain_divergence(p, q, objective, **options)
    return (1 - cross_entropy_weight) * divergence + cross_entropy_weight * cross_entropy(student, labels)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    q = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    return -q[torch.arange(len(labels)), labels].log().sum()


@torch.no_grad()
def dense_mean(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Row], vocab: int, **options: float | str
) -> float:
    """The objective over rows of tokens, each run alone, divided by the number of supervised tokens."""
    total, count = 0.0, 0
    for input_ids, row_labels in rows:
        labels = torch.tensor(row_labels[1:])
        chosen = labels != -100
        one, other = (
            model(input_ids=torch.tensor([input_ids])).logits[0, :-1, :vocab].double()[chosen]
            for model in (student, teacher)
        )
        total += float(dense_loss(one, other, labels[chosen], **options))  # type: ignore[arg-type]
        count += int(chosen.sum())
    return total / count


def student_model(**options: Any) -> PreTrainedModel:
    return random_model(tiny_config("llama", layers=1, **options), seed=1, std=0.1)


def teacher_model(**options: Any) -> PreTrainedModel:
    return random_model(tiny_config("llama", layers=2, **options), seed=2, std=0.2)


def make_config(directory: Path, **options: Any) -> StepwiseDistillationConfig:
    return StepwiseDistillationConfig(
        **{
            "output_dir": str(directory / "trainer"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "max_new_tokens": 6,
        }
        | options
    )


class Observer(TrainerCallback):
    """Keeps the gradient of every step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def make_trainer(
    directory: Path,
    dataset: Dataset | IterableDataset | None = None,
    student: PreTrainedModel | str | None = None,
    teacher: PreTrainedModel | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    peft_config: LoraConfig | None = None,
    eval_dataset: Dataset | None = None,
    callbacks: list[TrainerCallback] | None = None,
    compute_metrics: Any = None,
    **options: Any,
) -> StepwiseDistillationTrainer:
    """Of tiny models on [`answers_dataset`]; a teacher of `options["teacher_cache"]` needs no model."""
    if teacher is None and "teacher_cache" not in options:
        teacher = teacher_model()
    return StepwiseDistillationTrainer(
        student_model() if student is None else student,
        teacher,
        make_config(directory, **options),
        train_dataset=answers_dataset() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer or tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def train(directory: Path, **options: Any) -> tuple[list[float], list[dict[str, torch.Tensor]], Any]:
    """Losses and gradients of every step, unclipped, and the trainer."""
    observer = Observer()
    trainer = make_trainer(directory, callbacks=[observer], **{"max_grad_norm": 0.0} | options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, observer.gradients, trainer


def assert_same_gradients(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Of each parameter, in the 2-norm and relative to it."""
    assert expected.keys() == found.keys()
    assert sum(float(value.norm()) for value in expected.values()) > 1e-3
    for name, value in expected.items():
        assert float((value - found[name]).norm()) <= tolerance * float(value.norm()) + 1e-9, name


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def supervised(prompt: list[int], answer: list[int]) -> Row:
    return prompt + answer, [-100] * len(prompt) + answer


def everything(ids: list[int]) -> Row:
    return ids, ids


CONVERSATION = [
    turn("user", "w1 w2"),
    turn("assistant", "w3"),
    turn("user", "w4"),
    turn("assistant", "w5 w6"),
]
CONVERSATION_IDS = [
    USER,
    W0 + 1,
    W0 + 2,
    END,
    ASSISTANT,
    W0 + 3,
    END,
    USER,
    W0 + 4,
    END,
    ASSISTANT,
    W0 + 5,
    W0 + 6,
    END,
]
ANSWERED = {5, 6, 11, 12, 13}  # both answers with their end-of-turn tokens
SHORT = [turn("user", "w7"), turn("assistant", "w8 w9 w1")]
SHORT_ROW = supervised([USER, W0 + 7, END, ASSISTANT], [W0 + 8, W0 + 9, W0 + 1, END])
CONVERSATION_ROW: Row = (
    CONVERSATION_IDS,
    [token if index in ANSWERED else -100 for index, token in enumerate(CONVERSATION_IDS)],
)
ANSWER_ROWS = [
    supervised([W0 + 1, W0 + 2, W0 + 3], [W0 + 4, EOS]),
    supervised([W0 + 5], [W0 + 6, W0 + 7, W0 + 8, EOS]),
]

# Kind of data -> (rows of the dataset, options, rows as token ids and labels by hand).
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[Row]]] = {
    "text": (
        [{"text": "w1 w2 w3"}, {"text": "w4"}],
        {},
        [everything([W0 + 1, W0 + 2, W0 + 3, EOS]), everything([W0 + 4, EOS])],
    ),
    "text column": (
        [{"body": "w1 w2 w3", "title": "w9"}],
        {"dataset_text_field": "body"},
        [everything([W0 + 1, W0 + 2, W0 + 3, EOS])],
    ),
    "answers": (
        [{"prompt": "w1 w2 w3", "completion": " w4"}, {"prompt": "w5", "completion": " w6 w7 w8"}],
        {},
        ANSWER_ROWS,
    ),
    "answers, all supervised": (
        [{"prompt": "w1 w2 w3", "completion": " w4"}],
        {"completion_only_loss": False},
        [everything([W0 + 1, W0 + 2, W0 + 3, W0 + 4, EOS])],
    ),
    "conversational answers": (
        [{"prompt": SHORT[:1], "completion": SHORT[1:]}],
        {},
        [SHORT_ROW],
    ),
    "messages": ([{"messages": CONVERSATION}, {"messages": SHORT}], {}, [CONVERSATION_ROW, SHORT_ROW]),
    "messages, all supervised": (
        [{"messages": CONVERSATION}],
        {"completion_only_loss": False},
        [everything(CONVERSATION_IDS)],
    ),
    "tokens with labels": (
        [{"input_ids": list(ids), "labels": list(labels)} for ids, labels in (CONVERSATION_ROW, *ANSWER_ROWS)],
        {},
        [CONVERSATION_ROW, *ANSWER_ROWS],
    ),
    "tokens": ([{"input_ids": CONVERSATION_IDS}], {}, [everything(CONVERSATION_IDS)]),
}
