"""`cbd bridge train` and `cbd bridge cache`: a bridge from a source, from a cache of it, and from its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hf import cli
from cbd_hf.distillation.cache import TeacherCache

from ..distillation.test_bridge_chain import recipe  # noqa: F401


OPTIONS = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--max_length", "96", "--report_to", "none"]
OPTIONS += ["--learning_rate", "1e-2", "--save_steps", "1", "--disable_tqdm", "true"]


@pytest.fixture
def words(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """Student, source and dataset on the command line."""
    monkeypatch.setenv("CBD_TRACEBACK", "1")
    return ["--model", recipe["bridge"]["checkpoint"], "--source", recipe["source"], "--dataset", recipe["dataset"]]


def bridge(*arguments: str | Path) -> None:
    assert cli.main(["bridge", *map(str, arguments)]) == 0


def weights(directory: Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(directory).parameters()])


def test_from_the_source_and_from_a_cache(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = weights(Path(words[1]))
    bridge("train", *words, "--output_dir", tmp_path / "live", *OPTIONS)
    live = weights(tmp_path / "live")
    assert live.shape == before.shape and not torch.equal(live, before)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "live")) == len(AutoTokenizer.from_pretrained(words[1]))
    assert json.loads(capsys.readouterr().out.rpartition(f"{tmp_path / 'live'}: ")[2])["steps"] == 2

    vocabulary = AutoModelForCausalLM.from_pretrained(words[3]).config.vocab_size
    rows = ["--max_length", "96", "--k", str(vocabulary), "--log_prob_dtype", "float32", "--dtype", "float32"]
    bridge("cache", *words, "--output_dir", tmp_path / "cache", *rows)
    assert TeacherCache.from_pretrained(tmp_path / "cache").manifest.settings.labels
    (Path(words[3]) / "model.safetensors").unlink()
    more = ["--teacher_cache", tmp_path / "cache"]
    with pytest.raises((OSError, ValueError)):
        bridge("train", *words, "--output_dir", tmp_path / "none", *OPTIONS)
    bridge("train", *words, "--output_dir", tmp_path / "cached", *OPTIONS, *more)
    torch.testing.assert_close(weights(tmp_path / "cached"), live, rtol=0, atol=1e-3)


def test_from_answers(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bridge("generate", *words[2:], "--output_dir", tmp_path / "answers", "--max_new_tokens", "6")
    path = tmp_path / "bridge.yaml"
    output = tmp_path / "bridge"
    values = {"method": "sequence", "model": words[1], "dataset": str(tmp_path / "answers"), "output_dir": str(output)}
    path.write_text(yaml.safe_dump(values))
    bridge("train", "--config", path, *OPTIONS, "--max_answer_tokens", "6")
    assert not torch.equal(weights(output), weights(Path(words[1])))
    record = json.loads(capsys.readouterr().out.rpartition(f"{output}: ")[2])
    assert record == {"answers": 24, "dropped": {"max_answer_tokens": 0}}


def test_refused(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="full"):
        bridge("train", *words, "--output_dir", tmp_path / "full", *OPTIONS)
    without = [*words[:2], *words[4:]]
    with pytest.raises(ValueError, match="needs the source"):
        bridge("train", *without, "--output_dir", tmp_path / "bridge", *OPTIONS)
    with pytest.raises(ValueError, match="output_dir is needed"):
        bridge("cache", *words)
    with pytest.raises(FileNotFoundError, match="answers"):
        bridge("train", *words, "--method", "sequence", "--output_dir", tmp_path / "bridge", *OPTIONS)
    assert (tmp_path / "full" / "notes").read_text() == "mine" and not (tmp_path / "bridge").exists()
