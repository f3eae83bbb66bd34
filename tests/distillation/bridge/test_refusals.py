"""What a bridge cannot be trained with is said before the first step, with what to change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from cbd_hf import StepwiseDistillationConfig
from cbd_hf._trl import DataCollatorForLanguageModeling
from cbd_hf.distillation.bridge.config import BridgeDistillationConfig
from cbd_hf.distillation.bridge.trainer import BridgeDistillationTrainer

from ..helpers import make_config as stepwise_config
from .helpers import (
    make_config,
    make_dataset,
    make_trainer,
    rows_of,
    source_model,
    source_tokenizer,
    student_model,
    student_tokenizer,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 0.5}, "lmbda=0.5 is not possible with a bridge"),
        ({"packing": True}, "packing and padding_free are not possible with a bridge: set both to False"),
        ({"padding_free": True}, "packing and padding_free are not possible"),
        ({"cross_entropy_weight": 1.0}, "cross_entropy_weight=1 would not use the source"),
        ({"method": "kl"}, r"method='kl' is unknown; choose one of"),
        ({"method": "alm", "alm_temperature": 0.0}, "alm_temperature=0.0 must be greater than 0"),
        ({"method": "uld", "uld_tokens": -2}, "uld_tokens=-2 must be at least 1, or 0"),
        ({"source_prompt": "none"}, "source_prompt='none' is unknown; choose one of"),
        ({"source_max_length": 1}, "source_max_length=1 must be at least 2"),
        ({"method": "uld", "teacher_cache": "somewhere"}, "set uld_tokens to at most the k of the cache"),
        ({"objective": "kl"}, "objective='kl' is unknown"),
    ],
)
def test_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_other_arguments(tmp_path: Path) -> None:
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    for options, message in (
        ({"data_collator": collator}, "data_collator is a DataCollatorForLanguageModeling; give a BridgeDataCollator"),
        ({"formatting_func": str}, "formatting_func is not possible with a bridge"),
        ({"teacher_processing_class": None}, "The source's tokenizer is not known"),
        ({"method": "sequence"}, "method='sequence' trains on the source's answers alone"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="args is a StepwiseDistillationConfig; give a BridgeDistillationConfig"):
        BridgeDistillationTrainer(student_model(), source_model(), stepwise_config(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="No teacher"):
        BridgeDistillationTrainer(
            student_model(),
            None,
            make_config(tmp_path),
            train_dataset=make_dataset(),
            processing_class=student_tokenizer(),
            teacher_processing_class=source_tokenizer(),
        )


def words_tokenizer(letter: str) -> PreTrainedTokenizerFast:
    words = ["<eos>", "<unk>", *(f"{letter}{number}" for number in range(20))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def test_nothing_shared(tmp_path: Path) -> None:
    """That both have a token for the end of a text is not enough."""
    with pytest.raises(ValueError, match="share no token"):
        make_trainer(
            tmp_path,
            Dataset.from_list([{"text": "a1 a2 a3"}]),
            processing_class=words_tokenizer("a"),
            teacher_processing_class=words_tokenizer("b"),
        )


def test_models_of_other_tokenizers(tmp_path: Path) -> None:
    few = {"vocab_size": rows_of(source_tokenizer(), -1)}
    with pytest.raises(ValueError, match="The source has vocab_size .* but its tokenizer has tokens up to"):
        make_trainer(tmp_path, source=source_model(**few))
    few = {"vocab_size": rows_of(student_tokenizer(), -1)}
    with pytest.raises(ValueError, match="The student has vocab_size .* but its tokenizer has tokens up to"):
        make_trainer(tmp_path, student=student_model(**few))
    exact = make_trainer(
        tmp_path,
        student=student_model(vocab_size=rows_of(student_tokenizer(), 0)),
        source=source_model(vocab_size=rows_of(source_tokenizer(), 0)),
    )
    exact.train()


def test_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt takes .* raise max_length, or drop long prompts") as caught:
        make_trainer(tmp_path, max_length=3)
    assert "max_length=3 and source_max_length=6" in str(caught.value)
    long = {"prompt": "The cat sat on the mat. " * 20, "completion": " A dog."}
    with pytest.warns(UserWarning, match=r"1 of 2 rows have no supervised token .* within max_length=32"):
        make_trainer(tmp_path, Dataset.from_list([long, {**long, "prompt": "Who?"}]), max_length=32).train()
    for rows, message in (
        ([{"input_ids": [1, 2], "labels": [1, 2]}], "the source cannot read"),
        ([{"question": "a"}], r"The dataset has the columns \['question'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, Dataset.from_list(rows))


@pytest.mark.parametrize("role", ["student", "source"])
def test_messages_without_a_chat_template(role: str, tmp_path: Path) -> None:
    name = {"student": "processing_class", "source": "teacher_processing_class"}[role]
    tokenizer = {"student": student_tokenizer, "source": source_tokenizer}[role]()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=f"{role}.* chat template"):
        make_trainer(tmp_path, make_dataset("messages"), **{name: tokenizer})
    if role == "source":
        with pytest.raises(ValueError, match="source.* chat template"):
            make_trainer(tmp_path, source_prompt="chat", **{name: tokenizer})
    losses = make_trainer(tmp_path, make_dataset("text"), **{name: tokenizer}).train()
    assert torch.isfinite(torch.tensor(losses.training_loss))


def test_configs_round_trip(tmp_path: Path) -> None:
    config = make_config(tmp_path, method="alm", alm_temperature=7.0, source_prompt="chat", source_max_length=99)
    values = copy.deepcopy(config.to_dict())
    again = BridgeDistillationConfig(**{name: values[name] for name in ("output_dir", "method", "alm_temperature")})
    assert (
        again.make_span_objective()
        == BridgeDistillationConfig(str(tmp_path), method="alm", alm_temperature=7.0).make_span_objective()
    )
    assert isinstance(config, StepwiseDistillationConfig) and values["source_max_length"] == 99
