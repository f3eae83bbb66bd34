"""What a batch is made of: masks, trimming, packing, steps sorted by length, workers, and the memory of a step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PreTrainedModel

from cbd_hf import StepwiseDistillationTrainer
from cbd_hf._trl import DataCollatorForLanguageModeling
from cbd_hf.distillation import tiles
from cbd_hf.distillation.batching import DistillationCollator, StepSampler, number_examples, row_lengths, trimmed

from ..models import VOCAB, answers_dataset, random_model, tiny_config, tiny_tokenizer, words
from .helpers import (
    KINDS,
    W0,
    assert_same_gradients,
    dense_mean,
    everything,
    make_config,
    make_trainer,
    student_model,
    teacher_model,
    train,
)


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# Own names of sizes, and what makes masks and positions another matter.
CHANGES: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4},
    "falcon": {"alibi": True, "head_dim": None, "new_decoder_architecture": True},
    "gemma2": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "max_seq_len": 64},
    "mamba": {"state_size": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


def family_model(family: str, layers: int, seed: int) -> PreTrainedModel:
    if family in ("gpt2", "llama"):
        return random_model(tiny_config(family, layers=layers), seed=seed, std=0.1 * seed)
    values = SMALL | {"num_hidden_layers": layers, "n_layers": layers, "n_layer": layers} | CHANGES.get(family, {})
    config = AutoConfig.for_model(family, **{name: value for name, value in values.items() if value is not None})
    return random_model(config, seed=seed, std=0.1 * seed)


def pair(family: str) -> dict[str, PreTrainedModel]:
    return {"student": family_model(family, 1, 1), "teacher": family_model(family, 2, 2)}


class Watched:
    """A teacher, and whether it was given masks."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher
        self.masked: list[bool] = []

    def predict(self, inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
        self.masked.append("attention_mask" in inputs)
        return self.teacher.predict(inputs, *rest)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "falcon", "gemma2", "mamba", "mistral", "mpt", "opt"])
def test_padding_has_no_say(family: str, tmp_path: Path) -> None:
    """Without the mask of right-padded rows, as with it, and as each row alone."""
    rows = [row for kind in ("messages", "answers") for row in KINDS[kind][2]]
    data = Dataset.from_list([{"input_ids": list(ids), "labels": list(labels)} for ids, labels in rows])
    expected = dense_mean(**pair(family), rows=rows, vocab=VOCAB)
    found = []
    for masked in (False, True):
        trainer = make_trainer(tmp_path, data, **pair(family), per_device_train_batch_size=len(rows))  # type: ignore[arg-type]
        seen = Watched(trainer.teacher)
        trainer.teacher = seen  # type: ignore[assignment]
        trainer._pads_right = not masked
        trainer.train()
        assert seen.masked == [masked]
        found.append(trainer.state.log_history[0]["loss"])
    assert found == [pytest.approx(expected, rel=1e-4)] * 2


def test_trimming() -> None:
    labels = torch.tensor([[-100, 5, -100, -100, -100], [-100, -100, 6, -100, -100]])
    batch = {
        "input_ids": labels.clone(),
        "attention_mask": torch.ones(2, 5),
        "labels": labels,
        "other": torch.ones(2, 3),
    }
    short = trimmed(batch)
    assert {name: tuple(value.shape) for name, value in short.items()} == {
        "input_ids": (2, 3),
        "attention_mask": (2, 3),
        "labels": (2, 3),
        "other": (2, 3),
    }
    assert trimmed(batch, multiple=4)["labels"].shape == (2, 4)
    assert trimmed(batch, multiple=64)["labels"].shape == (2, 5)
    nothing = batch | {"labels": torch.full((2, 5), -100)}
    assert trimmed(nothing)["labels"].shape == (2, 2)
    padding_free = {name: value for name, value in batch.items() if name != "attention_mask"}
    assert trimmed(padding_free) == padding_free


class Rows:
    """A cache that says which rows it was asked for."""

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"teacher_rows": torch.tensor(rows)}


def test_the_collator_adds_what_is_known_of_rows() -> None:
    seen: list[dict[str, Any]] = []

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(examples)
        return {"input_ids": torch.zeros(len(examples), 4)}

    dataset = number_examples(Dataset.from_dict({"input_ids": [[1], [2], [3]], "example_id": [7, 7, 7]}), [5, 4, 5])
    assert list(dataset["example_id"]) == [0, 1, 2]
    batch = DistillationCollator(collate, Rows())([dataset[2], dataset[1]])
    assert batch["example_id"].tolist() == [2, 1] and batch["teacher_rows"].tolist() == [5, 4]
    assert all(set(example) == {"input_ids"} for example in seen)
    with pytest.raises(ValueError, match="have not been looked up in the teacher's cache"):
        DistillationCollator(collate, Rows())([{"input_ids": [1]}])
    assert "example_id" not in DistillationCollator(collate)([{"input_ids": [1]}])


def texts(count: int = 12) -> Dataset:
    rng = random.Random(0)
    return Dataset.from_list([{"text": words(rng, 2 + index % 5)} for index in range(count)])


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 24}, {"padding_free": True, "max_length": None}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_packed_rows_do_not_see_each_other(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Neither in the student nor in the teacher: loss and gradient are those of rows by themselves."""
    found = [
        train(tmp_path, dataset=texts(), **pair(family), per_device_train_batch_size=12, **changes)
        for changes in ({}, options)
    ]
    (losses, (gradients,), _), (others, (other,), _) = found
    assert others == pytest.approx(losses, rel=1e-5)
    assert_same_gradients(gradients, other)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("family", ["bloom", "opt", "mamba"])
def test_packing_is_refused_where_rows_would_see_each_other(family: str, who: str, tmp_path: Path) -> None:
    models = pair("llama") | {who: pair(family)[who]}
    with pytest.raises(ValueError, match=rf"the {who}'s architecture \({family}\) is not known to keep apart"):
        make_trainer(tmp_path, texts(), **models, packing=True, max_length=24)  # type: ignore[arg-type]
    make_trainer(tmp_path, texts(), **models, packing=True, max_length=24, packing_strategy="wrapped")  # type: ignore[arg-type]


def steps_of(directory: Path, rows: int, sort: bool, **options: Any) -> list[list[list[int]]]:
    """Row numbers of the micro-batches of every step of two epochs."""
    seen: list[list[list[int]]] = []
    trainer = make_trainer(
        directory,
        answers_dataset(rows),
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        sort_steps_by_length=sort,
        **options,
    )
    take = trainer.get_batch_samples

    def watched(*args: Any) -> Any:
        batches, count = take(*args)
        if batches:
            seen.append([batch["example_id"].tolist() for batch in batches])
        return batches, count

    trainer.get_batch_samples = watched  # type: ignore[method-assign]
    trainer.train()
    return seen


@pytest.mark.parametrize("rows", [18, 15])
@pytest.mark.parametrize(
    "options",
    [{}, {"seed": 7}, {"data_seed": 5}, {"train_sampling_strategy": "sequential"}, {"dataloader_drop_last": True}],
)
def test_sorting_keeps_the_rows_of_every_step(rows: int, options: dict[str, Any], tmp_path: Path) -> None:
    plain, ordered = (steps_of(tmp_path, rows, sort, **options) for sort in (False, True))
    assert [sorted(sum(step, [])) for step in plain] == [sorted(sum(step, [])) for step in ordered]
    assert plain != ordered
    lengths = [len(row["input_ids"]) for row in make_trainer(tmp_path, answers_dataset(rows)).train_dataset]
    for step in ordered:
        own = [lengths[row] for row in sum(step, [])]
        assert own == sorted(own, reverse=True)
    if options.get("train_sampling_strategy") != "sequential":
        half = len(plain) // 2
        assert plain[:half] != plain[half:]  # epochs are shuffled differently


@pytest.mark.parametrize("rows", [18, 15])
def test_sorting_keeps_the_gradient_and_saves_padding(rows: int, tmp_path: Path) -> None:
    steps = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    options: dict[str, Any] = {"dataset": answers_dataset(rows), "learning_rate": 1e-4, **steps}
    (losses, gradients, _), (others, other, _) = (
        train(tmp_path, sort_steps_by_length=sort, **options) for sort in (False, True)
    )
    assert others == pytest.approx(losses, rel=1e-4)
    assert_same_gradients(gradients[0], other[0])
    assert_same_gradients(gradients[-1], other[-1], 1e-2)  # of the incomplete step; AdamW has amplified rounding
    sizes = []
    steps |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    for sort in (False, True):
        trainer = make_trainer(tmp_path, answers_dataset(60), sort_steps_by_length=sort, **steps)  # type: ignore[arg-type]
        sizes.append(sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader()))
    assert sizes[1] < 0.9 * sizes[0]


def test_lengths_of_rows() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1] * (index % 7) for index in range(50)]})
    assert row_lengths(dataset) == [index % 7 for index in range(50)]
    assert row_lengths(dataset.select([3, 1, 49])) == [3, 1, 0]
    sampler = StepSampler([3, 1, 2, 5, 4], 2, shuffle=False)
    assert list(sampler) == [0, 1, 3, 2, 4] and len(sampler) == 5


def test_rows_that_only_the_collator_tokenizes(tmp_path: Path) -> None:
    """Their lengths are not known, so that they are taken in the usual order."""
    tokenizer = tiny_tokenizer()
    pad = DataCollatorForLanguageModeling(pad_token_id=1)

    def tokenized(rows: list[dict[str, str]]) -> dict[str, Any]:
        return pad([{"input_ids": tokenizer(row["text"])["input_ids"]} for row in rows])

    data = Dataset.from_list([{"text": "w1 w2 w3"}, {"text": "w4 w5"}])
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    trainer = StepwiseDistillationTrainer(
        student_model(),
        teacher_model(),
        make_config(tmp_path, **options),
        data_collator=tokenized,
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    rows = [everything([W0 + 1, W0 + 2, W0 + 3]), everything([W0 + 4, W0 + 5])]
    expected = dense_mean(student_model(), teacher_model(), rows, VOCAB)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_workers(tmp_path: Path) -> None:
    (losses, gradients, _), (others, other, _) = (
        train(tmp_path, dataloader_num_workers=workers, max_steps=2, gradient_accumulation_steps=2)
        for workers in (0, 2)
    )
    assert others == losses
    for one, another in zip(gradients, other, strict=True):
        assert all(torch.equal(value, another[name]) for name, value in one.items())


@pytest.mark.parametrize("options", [{}, {"hidden_loss_weight": 0.5}, {"lmbda": 1.0}])
def test_gradient_checkpointing(options: dict[str, Any], tmp_path: Path) -> None:
    (losses, gradients, _), (others, other, _) = (
        train(tmp_path, gradient_checkpointing=on, **options) for on in (False, True)
    )
    assert others == pytest.approx(losses, rel=1e-6)
    assert_same_gradients(gradients[0], other[0], 1e-6)


def logged(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.parametrize("sort", [True, False])
def test_resuming_amid_an_epoch(sort: bool, tmp_path: Path) -> None:
    """Bit for bit what an undisturbed run ends with."""
    options: dict[str, Any] = {
        "dataset": answers_dataset(15),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "sort_steps_by_length": sort,
        "max_steps": 7,  # of 4 in an epoch
        "save_strategy": "steps",
        "save_steps": 1,
        "teacher": teacher_model(),
    }
    whole = make_trainer(tmp_path / "a", **options)
    whole.train()
    for step in (2, 4, 5):
        again = make_trainer(tmp_path / "b", **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"a/trainer/checkpoint-{step}"))
        for name, value in whole.model.named_parameters():
            assert torch.equal(again.model.get_parameter(name), value), (step, name)
        logged = [
            {entry["step"]: entry["loss"] for entry in t.state.log_history if "loss" in entry} for t in (whole, again)
        ]
        assert logged[0] == logged[1]


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                Largest.size = max(Largest.size, value.numel())
        return result


@pytest.mark.parametrize(
    "options", [{}, {"objective": "adaptive_kl"}, {"cross_entropy_weight": 0.5, "temperature": 2.0}]
)
def test_the_logits_of_a_batch_never_exist(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a step nor in evaluation."""
    vocab = 2048
    monkeypatch.setitem(tiles._TILE_VALUES, "cpu", 8 * vocab)
    data = Dataset.from_list([{"text": words(random.Random(index), 40)} for index in range(4)])
    trainer = make_trainer(
        tmp_path,
        data,
        student_model(vocab_size=vocab),
        teacher_model(vocab_size=vocab),
        eval_dataset=data,
        max_steps=2,
        **options,
    )
    Largest.size = 0
    with Largest():
        trainer.train()
        trainer.evaluate()
    assert 0 < Largest.size < 4 * 40 * vocab
    assert Largest.size <= 2048 * 32  # the embeddings: tiles are smaller
