"""Bridge training: value and gradient by a plain formula, however a batch is split, whatever the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from cbd_hf.tokenization.collator import BridgeDataCollator
from cbd_hf.tokenization.rows import COLUMNS

from ...models import logits
from ..helpers import assert_same_gradients
from .helpers import (
    make_dataset,
    make_trainer,
    plain_step,
    source_model,
    source_tokenizer,
    student_model,
    student_tokenizer,
    train,
)


METHODS: dict[str, dict[str, Any]] = {
    "overlap_kl": {},
    "overlap_kl, warm": {"objective": "generalized_jsd", "temperature": 2.0, "cross_entropy_weight": 0.0},
    "alm": {"method": "alm"},
    "alm, any end": {"method": "alm", "alm_bias_threshold": 0.0},
    "alm of single spans": {"method": "alm", "alm_debias": False},
    "uld": {"method": "uld"},
    "mined": {"method": "mined", "objective": "reverse_kl"},
}
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "answers": {},
    "messages": {},
    "answers, all supervised": {"completion_only_loss": False},
    "answers to a chat": {"source_prompt": "chat"},
}


def rows_by_id(trainer: Any) -> list[dict[str, Any]]:
    return [{name: row[name] for name in COLUMNS} for row in trainer.train_dataset]


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *[("overlap_kl", kind) for kind in KINDS],
        *[(method, "answers") for method in METHODS if method != "overlap_kl"],
        ("alm", "messages"),
    ],
)
def test_value_and_gradient(method: str, kind: str, tmp_path: Path) -> None:
    dataset = make_dataset(kind.split(",")[0].split(" ")[0], rows=6)
    options = METHODS[method] | KINDS[kind] | {"per_device_train_batch_size": 6, "tokens_per_pass": 60}
    losses, (found,), trainer = train(tmp_path, dataset=dataset, **options)
    rows = rows_by_id(trainer)
    assert sum(max(row["spans"]) >= 0 for row in rows) >= 5  # the comparison is not an empty one
    expected = plain_step(trainer, rows, student_model(), source_model())
    log = trainer.state.log_history[0]
    assert losses == [pytest.approx(expected["loss"], rel=1e-4)]
    assert log["divergence"] == pytest.approx(expected["divergence"], rel=1e-4)
    assert log["divergence"] > 1e-3
    assert_same_gradients(expected["gradient"], found, 1e-4)


def test_hidden_states(tmp_path: Path) -> None:
    """In front of spans."""
    options: dict[str, Any] = {"hidden_loss_weight": 0.7, "hidden_loss_layers": [1, 2]}
    dataset = make_dataset(rows=4)
    losses, (found,), trainer = train(
        tmp_path, dataset=dataset, student=student_model(2), source=source_model(4), **options
    )
    expected = plain_step(trainer, rows_by_id(trainer), student_model(2), source_model(4), [(1, 2), (2, 4)])
    assert losses == [pytest.approx(expected["loss"], rel=1e-4)]
    assert trainer.state.log_history[0]["hidden_loss"] == pytest.approx(expected["hidden_loss"], rel=1e-4)
    assert_same_gradients(expected["gradient"], found, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(method: str, tmp_path: Path) -> None:
    losses, _, trainer = train(
        tmp_path, max_steps=16, per_device_train_batch_size=6, lr_scheduler_type="constant", **METHODS[method]
    )
    logs = [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]
    for values in (losses, logs):
        assert sum(values[-4:]) < 0.9 * sum(values[:4])


@pytest.mark.parametrize("method", ["overlap_kl", "alm", "mined"])
def test_a_step_is_the_same_however_it_is_split(method: str, tmp_path: Path) -> None:
    options = METHODS[method] | {"hidden_loss_weight": 0.5}
    whole = train(tmp_path, per_device_train_batch_size=8, tokens_per_pass=0, **options)
    for rows, tokens in ((1, 0), (8, 1), (4, 90)):
        split = train(
            tmp_path,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=8 // rows,
            tokens_per_pass=tokens,
            **options,
        )
        assert split[0] == pytest.approx(whole[0], rel=1e-5)
        assert_same_gradients(whole[1][0], split[1][0], 1e-5)
        for name in ("divergence", "hidden_loss", "align_ratio", "span_ratio", "num_tokens"):
            logs = [trainer.state.log_history[0][name] for trainer in (whole[2], split[2])]
            assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def test_logs(tmp_path: Path) -> None:
    _, _, trainer = train(tmp_path, dataset=make_dataset("text", rows=4))
    single = inside = tokens = 0
    for row in rows_by_id(trainer):
        tokens += sum(label != -100 for label in row["labels"][1:])
        inside += sum(span >= 0 for span in row["spans"])
        single += sum(
            row["spans"].count(span) == row["source_spans"].count(span) == 1 for span in range(max(row["spans"]) + 1)
        )
    log = trainer.state.log_history[0]
    assert 0 < single < inside <= tokens
    assert log["align_ratio"] == pytest.approx(single / tokens)
    assert log["span_ratio"] == pytest.approx(inside / tokens)
    shared = trainer.vocabulary_map
    for side, groups in (("student", shared.student_groups), ("source", shared.source_groups)):
        assert log[f"vocabulary_coverage_{side}"] == pytest.approx(len(shared.student_ids) / len(groups))
    assert log["num_tokens"] == sum(len(row["input_ids"]) for row in rows_by_id(trainer))


def test_evaluation(tmp_path: Path) -> None:
    """The mean over tokens, not over batches; and training goes on as before it."""
    dataset = make_dataset(rows=7, seed=3)
    trainer = make_trainer(tmp_path, eval_dataset=dataset, per_device_eval_batch_size=3)
    found = trainer.evaluate()
    rows = [{name: row[name] for name in COLUMNS} for row in trainer.eval_dataset]
    expected = plain_step(trainer, rows, student_model(), source_model())
    assert found["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["eval_divergence"] == pytest.approx(expected["divergence"], rel=1e-4)
    assert 0 < found["eval_align_ratio"] <= found["eval_span_ratio"] <= 1
    trainer.train()
    plain = train(tmp_path)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(plain[0][0], rel=1e-6)
    assert logged["align_ratio"] == plain[2].state.log_history[0]["align_ratio"]


def test_evaluation_after_a_prediction(tmp_path: Path) -> None:
    """Which logs nothing, and counts nothing in what is logged next."""
    trainer = make_trainer(tmp_path, eval_dataset={"a": make_dataset(seed=1), "b": make_dataset("text", seed=2)})
    shares = ("eval_align_ratio", "eval_span_ratio", "eval_loss")
    first = trainer.evaluate(trainer.eval_dataset["a"])
    trainer.predict(trainer.eval_dataset["b"])
    second = trainer.evaluate(trainer.eval_dataset["a"])
    other = trainer.evaluate(trainer.eval_dataset["b"])
    assert [second[name] for name in shares] == [first[name] for name in shares]
    assert other["eval_align_ratio"] != first["eval_align_ratio"]


def test_prepared_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    losses, gradients, trainer = train(tmp_path, dataset=make_dataset("messages"))
    rows = Dataset.from_list(rows_by_id(trainer))
    others, found, other = train(tmp_path, dataset=rows)
    assert rows_by_id(other) == rows_by_id(trainer)
    assert others == losses
    assert_same_gradients(gradients[0], found[0], 1e-9)


def test_workers(tmp_path: Path) -> None:
    """Raw rows of a stream are aligned in the workers as well."""
    options: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-3}
    losses, _, _ = train(tmp_path, **options)
    assert train(tmp_path, dataloader_num_workers=2, **options)[0] == losses
    collator = BridgeDataCollator(student_tokenizer(), source_tokenizer())
    prepared = Dataset.from_dict(collator.encode(list(make_dataset("messages"))))
    raw, ready = (
        train(tmp_path, dataset=rows.to_iterable_dataset(num_shards=2), dataloader_num_workers=2, **options)
        for rows in (make_dataset("messages"), prepared)
    )
    assert raw[0] == ready[0] and len(raw[0]) == 3
    assert_same_gradients(ready[1][0], raw[1][0], 1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_are_merged(tied: bool, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path, student=student_model(tie_word_embeddings=tied), peft_config=lora, max_steps=2, method="alm"
    )
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    before = {name: trainer.model.get_parameter(name).detach().clone() for name in trainable}
    trainer.train()
    assert any(not torch.equal(trainer.model.get_parameter(name), value) for name, value in before.items())
    trainer.save_anchor(tmp_path / "anchor")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "anchor")
    assert {name for name, _ in saved.named_parameters()} == {
        name for name, _ in student_model(tie_word_embeddings=tied).named_parameters()
    }
    torch.testing.assert_close(logits(saved), logits(trainer.model.eval()), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "anchor/tokenizer.json").is_file()


def test_the_gradient_of_an_adapter(tmp_path: Path) -> None:
    """That of the whole matrix W + B A, through the chain rule; at the start B is 0."""
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["down_proj"])
    torch.manual_seed(0)
    adapted = make_trainer(tmp_path, peft_config=lora)
    (name,) = (name for name, _ in adapted.model.named_parameters() if "lora_A" in name)
    matrix = adapted.model.get_parameter(name).detach().clone()
    torch.manual_seed(0)
    losses, (found,), _ = train(tmp_path, peft_config=lora)
    whole, (plain,), _ = train(tmp_path)
    assert losses == pytest.approx(whole, rel=1e-6)
    expected = plain["model.layers.0.mlp.down_proj.weight"] @ matrix.T
    torch.testing.assert_close(found[name.replace("lora_A", "lora_B")], expected, rtol=1e-4, atol=1e-6)


def test_a_resumed_training_is_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "hidden_loss_weight": 0.1,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 5,
    }
    _, _, whole = train(tmp_path / "a", max_steps=4, **options)
    train(tmp_path / "b", max_steps=2, **options)
    resumed = make_trainer(tmp_path / "b", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for name, value in resumed.model.named_parameters():
        assert torch.equal(value, whole.model.get_parameter(name)), name


def test_an_epoch_that_is_not_whole(tmp_path: Path) -> None:
    """The last step has the rows that are left, once."""
    options: dict[str, Any] = {"train_sampling_strategy": "sequential", "learning_rate": 1e-9}
    losses, gradients, _ = train(tmp_path, dataset=make_dataset(rows=6), max_steps=-1, num_train_epochs=1, **options)
    rest = train(tmp_path, dataset=make_dataset(rows=6).select([4, 5]), **options)
    assert len(losses) == 2 and losses[1:] == pytest.approx(rest[0], rel=1e-5)
    assert_same_gradients(rest[1][0], gradients[1], 1e-5)
