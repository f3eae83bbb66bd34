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
from cbd_hf.distillation.bridge.trainer import BridgeDistillationTrainer, _source_config
from cbd_hf.tokenization.collator import BridgeDataCollator

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
    """Embeddings that end before BOS of the source, or EOS of the student."""
    for role, tokenizer in (("source", source_tokenizer()), ("student", student_tokenizer())):
        last = tokenizer.bos_token_id if role == "source" else tokenizer.eos_token_id
        few = {"source": source_model, "student": student_model}[role](vocab_size=last)
        with pytest.raises(ValueError, match=f"The {role} has vocab_size {last}, but its tokenizer has tokens up to"):
            make_trainer(tmp_path, **{role: few})  # type: ignore[arg-type]
    exact = make_trainer(
        tmp_path,
        student=student_model(vocab_size=rows_of(student_tokenizer(), 0)),
        source=source_model(vocab_size=rows_of(source_tokenizer(), 0)),
    )
    exact.train()


def test_tokens_that_only_the_tokenizer_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Gemma 3's text models, which lack the token for an image: texts without it train."""
    tokenizer = source_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    options: dict[str, Any] = {"source": source_model(vocab_size=rows), "teacher_processing_class": tokenizer}
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    assert trainer.state.log_history[0]["divergence"] > 0
    assert f"The source has {rows} tokens and none of 1 that its tokenizer was given besides: <image>" in caplog.text
    pictures = [{"text": "A cat."}, {"text": "A cat. <image> And so on."}]
    for dataset in (Dataset.from_list(pictures), Dataset.from_list(pictures).to_iterable_dataset()):
        with pytest.raises(ValueError, match=rf"Row 1 has the token '<image>' \({rows}\), but the source has {rows}"):
            make_trainer(tmp_path, dataset, **options)


def long_texts() -> Dataset:
    return Dataset.from_list([{"text": " ".join(row["text"] for row in make_dataset("text", rows=20))}] * 4)


def test_rows_longer_than_a_models_positions(tmp_path: Path) -> None:
    """By default both sides are cut where a model ends; what is asked for beyond is refused."""
    few = {"student": student_model(max_position_embeddings=40), "source": source_model(n_positions=32)}
    trainer = make_trainer(tmp_path, long_texts(), source=few["source"])
    assert (trainer._bridge_collator.max_length, trainer._bridge_collator.source_max_length) == (256, 32)
    assert all(20 < len(row["source_input_ids"]) <= 32 for row in trainer.train_dataset)
    trainer.train()
    trainer = make_trainer(tmp_path, long_texts(), student=few["student"], max_length=None)
    assert (trainer._bridge_collator.max_length, trainer._bridge_collator.source_max_length) == (40, 80)
    trainer.train()
    for options, message in (
        ({"max_length": 41}, "max_length=41 is more than the 40 positions of the student"),
        ({"max_length": 16, "source_max_length": 33}, "source_max_length=33 is more than the 32 positions of the sou"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, long_texts(), **few, **options)  # type: ignore[arg-type]
    prepared = Dataset.from_dict(
        BridgeDataCollator(student_tokenizer(), source_tokenizer()).encode(list(long_texts()))
    )
    for rows in (prepared, prepared.to_iterable_dataset()):
        with pytest.raises(ValueError, match="Row 0 has .* tokens of the source, which has 32 positions"):
            make_trainer(tmp_path, rows, source=few["source"])


def test_a_cache_is_cut_as_its_source(tmp_path: Path) -> None:
    """Without the source's weights too, if its config lies beside its tokenizer."""
    source_tokenizer().save_pretrained(tmp_path)
    source_model(n_positions=32).config.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for cache, source in (("somewhere", None), ("somewhere", str(tmp_path)), (None, str(tmp_path))):
        config = _source_config(source, tokenizer, make_config(tmp_path, teacher_cache=cache))
        assert config is not None and config.n_positions == 32
    args = make_config(tmp_path, teacher_cache="somewhere")
    assert _source_config(None, source_tokenizer(), args) is _source_config("org/none", tokenizer, args) is None


def test_rows_of_which_nothing_is_left(tmp_path: Path) -> None:
    """Also of a stream, and of rows that are prepared already."""
    prompts = Dataset.from_list([{**row, "prompt": "The cat sat on the mat. " * 9} for row in make_dataset()])
    short = BridgeDataCollator(student_tokenizer(), source_tokenizer(), max_length=8)
    prepared = Dataset.from_dict(short.encode(list(prompts)))
    stream = "12 of 12 rows at the start of the train stream have no supervised token"
    for dataset, message in (
        (prompts.to_iterable_dataset(), stream),
        (prepared, "12 of 12 rows have no supervised token"),
        (prepared.to_iterable_dataset(), stream),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, dataset, max_length=8)
    with pytest.raises(ValueError, match="Row 5: 'completion' is None"):
        rows = [{"prompt": "A cat", "completion": None if index == 5 else " sat."} for index in range(8)]
        make_trainer(tmp_path, Dataset.from_list(rows))


def test_a_chat_template_of_a_file(tmp_path: Path) -> None:
    tokenizer = student_tokenizer()
    template = tokenizer.chat_template
    tokenizer.chat_template = None
    (tmp_path / "own.jinja").write_text(template, encoding="utf-8")
    trainer = make_trainer(
        tmp_path,
        make_dataset("messages"),
        processing_class=tokenizer,
        chat_template_path=str(tmp_path / "own.jinja"),
    )
    plain = make_trainer(tmp_path, make_dataset("messages"))
    assert trainer.train_dataset[:] == plain.train_dataset[:]
    assert trainer.processing_class.chat_template == template
    assert trainer.vocabulary_map.student_ids.tolist() == plain.vocabulary_map.student_ids.tolist()
    for path in (tmp_path, tmp_path / "none.jinja"):
        with pytest.raises(ValueError, match="chat_template_path=.* must be a .jinja or .j2 file"):
            make_trainer(tmp_path, make_dataset("messages"), chat_template_path=str(path))


def test_another_end_of_texts(tmp_path: Path) -> None:
    """In the rows, the map and the saved configs."""
    trainer = make_trainer(tmp_path, eos_token="<s>")
    end = student_tokenizer().convert_tokens_to_ids("<s>")
    assert end != student_tokenizer().eos_token_id
    assert all(row["input_ids"][-1] == row["labels"][-1] == end for row in trainer.train_dataset)
    shared = dict(zip(trainer.vocabulary_map.student_ids, trainer.vocabulary_map.source_ids, strict=True))
    assert shared[end] == source_tokenizer().eos_token_id
    assert trainer.model.config.eos_token_id == trainer.processing_class.eos_token_id == end
    with pytest.raises(ValueError, match="eos_token='none' is no token of the student's tokenizer"):
        make_trainer(tmp_path, eos_token="none")


def test_a_collator_that_is_given(tmp_path: Path) -> None:
    """Brings its tokenizers and its options; others are refused."""
    collator = BridgeDataCollator(student_tokenizer(), source_tokenizer(), max_length=14)
    trainer = make_trainer(tmp_path, data_collator=collator, processing_class=None, teacher_processing_class=None)
    assert trainer.processing_class is collator.tokenizer
    assert 9 < max(len(row["input_ids"]) for row in trainer.train_dataset) <= 14
    trainer.train()
    make_trainer(tmp_path, data_collator=collator)  # of the same tokens
    other = student_tokenizer()
    other.add_tokens(["another"])
    for options, message in (
        ({"processing_class": other}, "processing_class .* has other tokens than that tokenizer of the data_collator"),
        ({"teacher_processing_class": student_tokenizer()}, "teacher_processing_class .* has other tokens"),
        ({"eos_token": "<s>"}, "eos_token='<s>' comes too late for a data_collator that is given"),
        ({"chat_template_path": "own.jinja"}, "chat_template_path='own.jinja' comes too late"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, data_collator=collator, **options)  # type: ignore[arg-type]


def test_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt takes .* raise max_length, or drop long prompts") as caught:
        make_trainer(tmp_path, max_length=3)
    assert "max_length=3 and source_max_length=6" in str(caught.value)
    long = {"prompt": "The cat sat on the mat. " * 20, "completion": " A dog."}
    with pytest.warns(UserWarning, match=r"1 of 2 rows have no supervised token .* within max_length=32"):
        trainer = make_trainer(tmp_path, Dataset.from_list([long, {**long, "prompt": "Who?"}]), max_length=32)
    assert len(trainer.train_dataset) == 1  # the other one would be a part of a step, or a step, and teach nothing
    stream = Dataset.from_list([{**long, "prompt": "Who?"}, long]).to_iterable_dataset()
    with pytest.warns(UserWarning, match="1 of 2 rows at the start"):
        assert len(list(make_trainer(tmp_path, stream, max_length=32).train_dataset)) == 1
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
