"""Rows are those of the trainer, so that a cache that was made without one fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from cbd_hf.distillation.cache import TeacherCache
from cbd_hf.distillation.cache.keys import keys_of
from cbd_hf.distillation.preparation import prepare_rows

from ..models import answers_dataset, tiny_tokenizer
from . import helpers
from .cache.helpers import build, make_trainer, save_teacher, training_config


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATION = [turn("user", "w1 w2"), turn("assistant", "w3"), turn("user", "w4"), turn("assistant", "w5 w6")]
TEXTS = [{"text": "w1 w2 w3 w4 w5"}, {"text": "w6"}, {"text": "w7 w8 w9"}, {"text": "w1 w5"}]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text": (TEXTS, {}),
    "answers": ([{"prompt": "w1 w2 w3", "completion": " w4"}, {"prompt": "w5", "completion": " w6 w7 w8"}], {}),
    "whole answers": ([{"prompt": "w1 w2", "completion": " w4 w5"}], {"completion_only_loss": False}),
    "chat answers": ([{"prompt": [turn("user", "w1")], "completion": [turn("assistant", "w2 w3")]}], {}),
    "messages": ([{"messages": CONVERSATION}, {"messages": CONVERSATION[:2]}], {}),
    "tokens": (
        [{"input_ids": [7, 8, 9, 10], "labels": [-100, -100, 9, 10]}, {"input_ids": [9, 8], "labels": [9, 8]}],
        {},
    ),
    "wrapped": (TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 4}),
    "packed": (TEXTS, {"packing": True, "max_length": 8}),
    "packed and shuffled": (TEXTS * 3, {"packing": True, "max_length": 8, "shuffle_dataset": True, "seed": 3}),
    "truncated": (TEXTS, {"max_length": 3}),
    "end kept": (TEXTS, {"max_length": 3, "truncation_mode": "keep_end"}),
    "another end": (TEXTS, {"eos_token": "<end>"}),
    "everything": ([{"messages": CONVERSATION}], {"completion_only_loss": False}),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_rows_are_the_trainers(case: str, tmp_path: Path) -> None:
    rows, options = CASES[case]
    trainer = make_trainer(tmp_path, Dataset.from_list(rows), **options)
    config = training_config(tmp_path, **options)
    teacher = save_teacher(tmp_path / "teacher")
    build(teacher, tmp_path / "cache", Dataset.from_list(rows), config=config, tokenizer=tiny_tokenizer())
    cache = TeacherCache.from_pretrained(tmp_path / "cache")
    keys = keys_of(trainer.train_dataset).keys
    assert np.array_equal(cache.keys()[cache.locate(trainer.train_dataset)], keys)
    assert len(cache) == len({key.tobytes() for key in keys})
    prepared = prepare_rows(Dataset.from_list(rows), tiny_tokenizer(), config)
    for column in ("input_ids", "labels"):
        assert prepared[column] == trainer.train_dataset[column]


def test_positions_are_the_collators(tmp_path: Path) -> None:
    """As many predictions as the batch of these rows has supervised positions, packed or not."""
    teacher = save_teacher(tmp_path / "teacher")
    for number, (rows, options) in enumerate((CASES["packed"], CASES["answers"], CASES["wrapped"])):
        dataset = Dataset.from_list(rows)
        trainer = make_trainer(tmp_path, dataset, **options)
        build(teacher, tmp_path / f"cache-{number}", dataset, config=training_config(tmp_path, **options))
        cache = TeacherCache.from_pretrained(tmp_path / f"cache-{number}")
        rows = [trainer.train_dataset[index] for index in range(min(2, len(trainer.train_dataset)))]
        batch = cache.batch(cache.locate(rows))
        labels = trainer.data_collator([dict(row) for row in rows])["labels"]
        assert len(batch["teacher_token_ids"]) == int((labels[:, 1:] != -100).sum())


def test_formatting_function_and_finished_rows(tmp_path: Path) -> None:
    def formatted(row: dict[str, Any]) -> str:
        return f"w1 {row['question']}"

    config = training_config(tmp_path)
    rows = prepare_rows(
        answers_dataset(2).select_columns("prompt").rename_column("prompt", "question"),
        tiny_tokenizer(),
        config,
        formatted,
    )
    assert all(ids[0] == tiny_tokenizer()("w1")["input_ids"][0] for ids in rows["input_ids"])
    config = training_config(tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
    assert prepare_rows(answers_dataset(2), tiny_tokenizer(), config).column_names == ["prompt", "completion"]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eos_token='<none>' is no token of the student's tokenizer"):
        prepare_rows(answers_dataset(2), tiny_tokenizer(), training_config(tmp_path, eos_token="<none>"))
    with pytest.raises(ValueError, match="chat_template_path=.* must be a .jinja or .j2 file"):
        prepare_rows(
            answers_dataset(2), tiny_tokenizer(), training_config(tmp_path, chat_template_path="Qwen/Qwen3-0.6B")
        )
    with pytest.raises(ValueError, match="no rows"):
        prepare_rows(answers_dataset(2).select([]), tiny_tokenizer(), training_config(tmp_path))


LONG = {"prompt": "w1 w2 w3 w4 w5", "completion": " w6"}
LONG_CASES = {
    "answers": LONG,
    "chat answers": {"prompt": [turn("user", LONG["prompt"])], "completion": [turn("assistant", "w6")]},
    "messages": {"messages": [turn("user", LONG["prompt"]), turn("assistant", "w6")]},
    "tokens": {"input_ids": [7, 8, 9, 10, 11], "labels": [-100, -100, -100, -100, 11]},
}


@pytest.mark.parametrize("kind", sorted(LONG_CASES))
def test_nothing_supervised_is_left(kind: str, tmp_path: Path) -> None:
    rows = Dataset.from_list([LONG_CASES[kind]] * 3)
    expected = 'keeps a supervised token within max_length=4: raise max_length, or set truncation_mode="keep_end"'
    with pytest.raises(ValueError, match=expected):
        prepare_rows(rows, tiny_tokenizer(), training_config(tmp_path, max_length=4))
    with pytest.raises(ValueError, match=expected):
        make_trainer(tmp_path, rows, max_length=4)
    config = training_config(tmp_path, max_length=4, truncation_mode="keep_end")
    assert len(prepare_rows(rows, tiny_tokenizer(), config)) == 3


def test_one_row_is_left(tmp_path: Path) -> None:
    rows = Dataset.from_list([LONG, LONG, {"prompt": "w1", "completion": " w2"}])
    assert len(prepare_rows(rows, tiny_tokenizer(), training_config(tmp_path, max_length=4))) == 1
    # All of a row counts, so that something is left of each.
    config = training_config(tmp_path, max_length=4, completion_only_loss=False)
    assert len(prepare_rows(rows, tiny_tokenizer(), config)) == 3


@pytest.mark.parametrize("max_length", [0, 1])
def test_too_short_rows(max_length: int, tmp_path: Path) -> None:
    config = training_config(tmp_path, max_length=max_length)
    with pytest.raises(ValueError, match=f"max_length={max_length} must be at least 2"):
        prepare_rows(Dataset.from_list(TEXTS), tiny_tokenizer(), config)


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The dataset has no rows"):
        prepare_rows(Dataset.from_dict({"text": []}), tiny_tokenizer(), training_config(tmp_path))


@pytest.mark.parametrize("row", [{"text": 5}, {"prompt": "w1", "completion": 5}])
def test_no_text(row: dict[str, Any], tmp_path: Path) -> None:
    column = "text" if "text" in row else "completion"
    with pytest.raises(ValueError, match=f"Column '{column}' of the dataset holds 5 in row 0, which is not text"):
        make_trainer(tmp_path, Dataset.from_list([row]))


def test_a_trainer_without_rows(tmp_path: Path) -> None:
    empty = answers_dataset(2).select([])
    for rows, evaluated in ((empty, None), (answers_dataset(2), empty)):
        with pytest.raises(ValueError, match="The dataset has no rows"):
            helpers.make_trainer(tmp_path, rows, eval_dataset=evaluated)
