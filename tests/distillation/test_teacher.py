"""Where the teacher's config and tokenizer are looked for, and what is said if they are not there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from cbd_hf.distillation import teacher as module
from cbd_hf.distillation.teacher import check_same_vocabulary, config_of, find_tokenizer, load_tokenizer

from ..models import tiny_config, tiny_tokenizer
from .helpers import make_config, make_trainer, student_model, teacher_model


@pytest.mark.parametrize("where", ["subfolder", "above"])
def test_a_teacher_in_a_subfolder(where: str, tmp_path: Path) -> None:
    """Its config decides on the hidden states' projection, its tokenizer on whether it is the student's."""
    teacher_model(heads=8).save_pretrained(tmp_path / "models" / "large")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "models" / ("large" if where == "subfolder" else ""))
    options: dict[str, Any] = {"teacher_model_init_kwargs": {"subfolder": "large"}, "hidden_loss_weight": 0.5}
    path = str(tmp_path / "models")
    assert config_of(path, make_config(tmp_path, **options)).num_attention_heads == 8  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"teacher's tokenizer \(65 tokens\) is not the student's"):
        make_trainer(tmp_path, teacher=path, **options)
    tiny_tokenizer().save_pretrained(tmp_path / "models" / ("large" if where == "subfolder" else ""))
    trainer = make_trainer(tmp_path, teacher=path, **options)
    trainer.train()
    assert trainer.teacher.hidden_size == 64


def test_options_of_the_hub_reach_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"revision": "old", "token": "t", "cache_dir": "c", "local_files_only": True}
    calls: list[dict[str, Any]] = []

    def loaded(path: str, **kwargs: Any) -> str:
        calls.append(kwargs)
        return path

    monkeypatch.setattr(module.AutoConfig, "from_pretrained", loaded)
    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", loaded)
    args = make_config(tmp_path, teacher_model_init_kwargs=where | {"dtype": "float32"}, trust_remote_code=True)
    config_of("org/teacher", args)
    find_tokenizer("org/teacher", args.teacher_model_init_kwargs, args.trust_remote_code)
    load_tokenizer("org/teacher", where, True)
    assert calls == [where | {"trust_remote_code": True}] * 3


def test_a_config_among_the_options(tmp_path: Path) -> None:
    config = tiny_config("llama", layers=5)
    found = config_of("./none", make_config(tmp_path, teacher_model_init_kwargs={"config": config}))
    assert isinstance(found, PretrainedConfig) and found is config


@pytest.mark.parametrize("kind", ["no path", "empty directory", "broken"])
def test_a_check_that_is_left_out_is_announced(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "broken":
        (tmp_path / "tokenizer_config.json").write_text("{}")

        def fails(*args: Any, **kwargs: Any) -> Any:
            raise ValueError("needs trust_remote_code")

        monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", fails)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        assert find_tokenizer(None if kind == "no path" else str(tmp_path)) is None
    (record,) = caplog.records
    assert "not compared" in record.message and "teacher_processing_class" in record.message
    reason = {"no path": "does not say", "empty directory": "there is none in", "broken": "needs trust_remote_code"}
    assert reason[kind] in record.message


def test_a_students_tokenizer_of_a_subfolder(tmp_path: Path) -> None:
    student_model().save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), {"subfolder": "small"}, False).get_vocab() == tiny_tokenizer().get_vocab()


def test_surplus_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Added tokens that both models lack, such as those for images, are named; ordinary ones and roles are needed."""
    tokenizer = tiny_tokenizer()
    models = student_model(), teacher_model()
    rows = models[0].config.vocab_size
    tokenizer.add_tokens([f"<spare {number}>" for number in range(rows - len(tokenizer))], special_tokens=True)
    check_same_vocabulary(*models, tokenizer)
    assert not caplog.records
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    check_same_vocabulary(*models, tokenizer)
    assert f"The student has {rows} tokens and none of 1 that its tokenizer was given besides: <image>" in caplog.text
    tokenizer.pad_token = "<image>"
    with pytest.raises(ValueError, match=f"The student has vocab_size {rows}"):
        check_same_vocabulary(*models, tokenizer)
