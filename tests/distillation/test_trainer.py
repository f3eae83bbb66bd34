"""The stepwise trainer: what is supervised, what is refused, what is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cbd_hf import StepwiseDistillationTrainer
from cbd_hf.distillation.columns import tokenize_turns

from ..distributed.gradient_worker import gradient, relative_difference
from ..models import VOCAB, answers_dataset, logits, random_model, tiny_config, tiny_tokenizer
from .helpers import (
    KINDS,
    W0,
    dense_mean,
    everything,
    make_config,
    make_trainer,
    student_model,
    teacher_model,
    turn,
)


@pytest.mark.parametrize("kind", KINDS)
def test_first_loss(kind: str, tmp_path: Path) -> None:
    """The logged loss is the objective over exactly the positions labelled by hand."""
    data, options, rows = KINDS[kind]
    trainer = make_trainer(tmp_path, Dataset.from_list(data), **options)
    before = trainer.model.get_parameter("model.norm.weight").detach().clone()
    trainer.train()
    expected = dense_mean(student_model(), teacher_model(), rows, VOCAB)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.state.log_history[0]["divergence"] == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(trainer.model.get_parameter("model.norm.weight"), before)


@pytest.mark.parametrize("known_columns", [True, False])
@pytest.mark.parametrize("kind", ["text", "answers", "messages"])
def test_streamed_data(kind: str, known_columns: bool, tmp_path: Path) -> None:
    data, options, rows = KINDS[kind]
    if known_columns:
        dataset = Dataset.from_list(data).to_iterable_dataset()
    else:
        dataset = IterableDataset.from_generator(lambda: iter(data))
    trainer = make_trainer(tmp_path, dataset, per_device_train_batch_size=len(data), **options)
    trainer.train()
    expected = dense_mean(student_model(), teacher_model(), rows, VOCAB)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "forward_kl"},
        {"objective": "generalized_jsd", "beta": 0.2},
        {"temperature": 3.0},
        {"objective": "forward_kl", "cross_entropy_weight": 0.4, "temperature": 2.0},
        {"cross_entropy_weight": 1.0},
    ],
)
def test_options_reach_the_loss(options: dict[str, Any], tmp_path: Path) -> None:
    data, _, rows = KINDS["answers"]
    trainer = make_trainer(tmp_path, Dataset.from_list(data), eval_dataset=Dataset.from_list(data), **options)
    expected = dense_mean(student_model(), teacher_model(), rows, VOCAB, **options)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.train()
    log = trainer.state.log_history
    assert next(entry["loss"] for entry in log if "loss" in entry) == pytest.approx(expected, rel=1e-4)
    divergence = dense_mean(student_model(), teacher_model(), rows, VOCAB, **options | {"cross_entropy_weight": 0.0})
    logged = [entry["divergence"] for entry in log if "divergence" in entry]
    assert logged == ([] if options.get("cross_entropy_weight") == 1 else [pytest.approx(divergence, rel=1e-4)])


def test_long_rows_are_cut(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Dataset.from_list([{"text": "w1 w2 w3 w4 w5"}]), max_length=3)
    trainer.train()
    expected = dense_mean(student_model(), teacher_model(), [everything([W0 + 1, W0 + 2, W0 + 3])], VOCAB)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_temperature_changes_the_gradient() -> None:
    one, two = (gradient(8, 1, temperature=temperature)["gradient"] for temperature in (1.0, 2.0))
    assert relative_difference(one, two) > 0.05


@pytest.mark.parametrize(
    ("objective", "temperature", "lmbda"),
    [("reverse_kl", 1.0, 0.0), ("forward_kl", 2.0, 0.0), ("reverse_kl", 1.0, 1.0)],
)
def test_the_divergence_falls(objective: str, temperature: float, lmbda: float, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=30, objective=objective, temperature=temperature, lmbda=lmbda, lr_scheduler_type="constant"
    )
    trainer.train()
    divergences = [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]
    assert len(divergences) == 30
    assert sum(divergences[-5:]) < (0.85 if lmbda else 0.6) * sum(divergences[:5])
    assert not any(parameter.requires_grad for parameter in trainer.teacher.model.parameters())


def test_the_teacher_is_not_trained(tmp_path: Path) -> None:
    teacher = teacher_model()
    make_trainer(tmp_path, teacher=teacher).train()
    for name, parameter in teacher_model().named_parameters():
        assert torch.equal(teacher.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    "columns", [["title", "body"], ["prompt"], ["completion", "title"], ["question", "answer"], ["labels"]]
)
@pytest.mark.parametrize("where", ["train", "eval", "eval dict"])
def test_wrong_columns_are_found_before_any_work(columns: list[str], where: str, tmp_path: Path) -> None:
    wrong, right = Dataset.from_list([dict.fromkeys(columns, "w1")]), answers_dataset()
    with pytest.raises(ValueError, match="The dataset has the columns") as caught:
        StepwiseDistillationTrainer(
            "./no-student",
            "./no-teacher",
            make_config(tmp_path),
            train_dataset=wrong if where == "train" else right,
            eval_dataset={"train": None, "eval": wrong, "eval dict": {"a": right, "b": wrong}}[where],
            processing_class=tiny_tokenizer(),
        )
    assert all(repr(name) in str(caught.value) for name in (*columns, "text", "completion", "messages", "input_ids"))


def test_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No teacher: pass teacher_model, or set teacher_model_name_or_path"):
        StepwiseDistillationTrainer(student_model(), args=make_config(tmp_path), train_dataset=answers_dataset())


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is required"):
        StepwiseDistillationTrainer(student_model(), teacher_model(), make_config(tmp_path))


def save(model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("by", ["argument", "config"])
def test_models_by_path(by: str, tmp_path: Path) -> None:
    """The tokenizer comes with the student; the teacher needs none, and may be loaded in another dtype."""
    student = save(student_model(), tmp_path / "student", tiny_tokenizer())
    teacher = save(teacher_model(), tmp_path / "teacher", tiny_tokenizer() if by == "config" else None)
    options = {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    if by == "config":
        options["teacher_model_name_or_path"] = teacher  # type: ignore[assignment]
    trainer = StepwiseDistillationTrainer(
        student,
        teacher if by == "argument" else None,
        make_config(tmp_path, **options),
        train_dataset=answers_dataset(),
    )
    assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    assert {parameter.dtype for parameter in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert not trainer.teacher.model.training
    trainer.train()


def other_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    return tokenizer


@pytest.mark.parametrize("given", ["directory", "argument"])
def test_a_teacher_of_another_tokenizer(given: str, tmp_path: Path) -> None:
    teacher = teacher_model(vocab_size=72)
    with pytest.raises(ValueError, match=r"teacher's tokenizer \(65 tokens\) is not the student's \(64"):
        if given == "directory":
            make_trainer(tmp_path, teacher=save(teacher, tmp_path / "teacher", other_tokenizer()))
        else:
            StepwiseDistillationTrainer(
                student_model(),
                teacher,
                make_config(tmp_path),
                train_dataset=answers_dataset(),
                processing_class=tiny_tokenizer(),
                teacher_processing_class=other_tokenizer(),
            )


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_padded_vocabularies(padded: str, tmp_path: Path) -> None:
    models: dict[str, Callable[..., PreTrainedModel]] = {"student": student_model, "teacher": teacher_model}
    student, teacher = (make(vocab_size=VOCAB + 8 * (name == padded)) for name, make in models.items())
    data, _, rows = KINDS["answers"]
    expected = dense_mean(student, teacher, rows, VOCAB)
    trainer = make_trainer(tmp_path, Dataset.from_list(data), student, teacher)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("short", ["student", "teacher"])
def test_a_vocabulary_smaller_than_the_tokenizer(short: str, tmp_path: Path) -> None:
    models = {"student": student_model(), "teacher": teacher_model()}
    models[short] = {"student": student_model, "teacher": teacher_model}[short](vocab_size=VOCAB - 1)
    with pytest.raises(ValueError, match=f"The {short} has vocab_size 63 but the tokenizer has 64 tokens"):
        make_trainer(tmp_path, **models)


def test_init_kwargs_of_a_loaded_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_model_init_kwargs only applies"):
        make_trainer(tmp_path, teacher_model_init_kwargs={"dtype": "float32"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "mse"}, r"objective='mse' is unknown; choose one of \['adaptive_kl'"),
        ({"cross_entropy_weight": 1.5}, r"cross_entropy_weight=1.5 is outside \[0, 1\]"),
        ({"cross_entropy_weight": -0.1}, "cross_entropy_weight=-0.1"),
        ({"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be greater than 0"),
        ({"lmbda": 1.5}, "lmbda"),
        ({"lmbda": -0.5}, "lmbda"),
        ({"beta": 2.0}, "beta"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 must be at least 1"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False makes the gradient depend"),
        ({"seq_kd": True}, "seq_kd=True is not a stepwise objective"),
        ({"router_aux_loss_coef": 0.01}, "router_aux_loss_coef=0.01.* is not part of this loss"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([turn("user", "w1")], "no assistant turn"),
        (
            [turn("user", "w1"), turn("assistant", "w2"), turn("user", "w3"), turn("assistant", "w4")],
            "renders turn 1 differently",
        ),
    ],
)
def test_conversations_that_cannot_be_supervised(messages: list[dict[str, str]], message: str) -> None:
    tokenizer = tiny_tokenizer()
    if "differently" in message:  # only the last turn ends with its marker
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + (' <end> ' if loop.last else ' ') }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
        )
    with pytest.raises(ValueError, match=message):
        tokenize_turns(messages, tokenizer)


def test_save_anchor(tmp_path: Path) -> None:
    student = student_model()
    student.generation_config.max_new_tokens = 77
    trainer = make_trainer(tmp_path, student=student, gradient_checkpointing=True)
    trainer.train()
    trainer.save_anchor(tmp_path / "anchor")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "anchor")
    for name, parameter in student_model().named_parameters():
        assert torch.equal(saved.get_parameter(name), trainer.model.get_parameter(name)), name
        assert not torch.equal(saved.get_parameter(name), parameter) or "norm" not in name
    assert torch.equal(logits(saved), logits(trainer.model))
    assert saved.config.use_cache and saved.generation_config.max_new_tokens == 77
    assert AutoTokenizer.from_pretrained(tmp_path / "anchor").get_vocab() == tiny_tokenizer().get_vocab()


def test_experts_learn_without_a_router_loss(tmp_path: Path) -> None:
    """Which TRL switches on by itself for a config that has its coefficient."""
    config = MixtralConfig(
        **tiny_config("mistral", layers=1).to_dict() | {"num_local_experts": 2, "router_aux_loss_coef": 0.5}
    )
    student = random_model(config, seed=1, std=0.1)
    data, _, rows = KINDS["answers"]
    expected = dense_mean(student, teacher_model(), rows, VOCAB)
    trainer = make_trainer(tmp_path, Dataset.from_list(data), student)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert not any("aux_loss" in entry for entry in trainer.state.log_history)
    trainer.save_anchor(tmp_path / "anchor")
    saved = AutoConfig.from_pretrained(tmp_path / "anchor")
    assert not saved.output_router_logits and saved.router_aux_loss_coef == 0.5
    assert make_config(tmp_path, router_aux_loss_coef=0.0).router_aux_loss_coef == 0.0


def test_the_card_cites_the_papers_method(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.create_model_card()
    card = (tmp_path / "trainer" / "README.md").read_text(encoding="utf-8")
    assert "2605.07783" in card and "Chain-based Distillation" in card and "2306.13649" not in card


def test_the_teachers_dtype(tmp_path: Path) -> None:
    """The default is for what is loaded here; a model is converted only if the option is set, and then itself."""
    teacher = teacher_model().to(torch.bfloat16)
    assert {p.dtype for p in make_trainer(tmp_path, teacher=teacher).teacher.model.parameters()} == {torch.bfloat16}
    make_trainer(tmp_path, teacher=teacher, teacher_dtype="float32")
    assert teacher.dtype == torch.float32
