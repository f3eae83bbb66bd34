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
from cbd_hf.commands.bridge_train import checkpoint
from cbd_hf.distillation import stages
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
    with pytest.raises(ValueError, match="no .safetensors"):
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
    shown = json.loads(capsys.readouterr().out.rpartition(f"{output}: ")[2])
    assert shown["kept"] == 24 and shown["dropped"] == {"max_answer_tokens": 0}
    record = json.loads((output / "cbd_bridge.json").read_text())
    assert record["steps"] == 2 and record["tokens"] > 0 and record["objective"] == {"name": "sequence"}
    assert record["answers"]["settings"]["max_new_tokens"] == 6 and record["teacher"] == words[3]
    assert record["answers"]["filters"]["max_answer_tokens"] == 6 and record["initial"] == words[1]


def killed(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_goes_on_only_with_what_was_begun(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    own = tmp_path / "out.json"
    own.write_text("mine")
    run = ["train", *words, "--output_dir", tmp_path / "out", *OPTIONS]
    bridge("train", *words, "--output_dir", tmp_path / "once", *OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "save_whole", killed)
        bridge(*run)
    unfinished = tmp_path / "out.training"
    before = {path: path.stat().st_mtime_ns for path in unfinished.rglob("*")}
    assert any(path.name == "checkpoint-2" for path in before)
    with pytest.raises(ValueError, match="training.cross_entropy_weight: was 0.5, is 0.9"):
        bridge(*run, "--cross_entropy_weight", "0.9")
    other = list(run)
    other[other.index("--source") + 1] = words[1]  # another source: the student itself
    with pytest.raises(ValueError, match="source_sha256"):
        bridge(*other)
    assert before == {path: path.stat().st_mtime_ns for path in unfinished.rglob("*")}

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "_remove", killed)
        bridge(*run)
    assert torch.equal(weights(tmp_path / "out"), weights(tmp_path / "once"))
    record = json.loads((tmp_path / "out" / "cbd_bridge.json").read_text())
    assert record["steps"] == 2 and record["tokens"] > 0 and record["teacher"] == words[3]
    assert record["objective"]["name"] == "overlap_kl" and record["data"]["dataset"] == words[5]
    assert 0 < json.loads((tmp_path / "once" / "cbd_bridge.json").read_text())["align_ratio"] <= 1
    assert unfinished.is_dir()

    monkeypatch.setattr(stages, "train_once", killed)
    bridge(*run)  # finished: nothing but the leftovers to remove
    assert not unfinished.exists() and own.read_text() == "mine"
    assert json.loads(capsys.readouterr().out.rpartition(f"{tmp_path / 'out'}: ")[2])["tokens"] == record["tokens"]
    with pytest.raises(FileExistsError, match="(?s)finished training.*cross_entropy_weight: was 0.5, is 0.9"):
        bridge(*run, "--cross_entropy_weight", "0.9")


def test_a_mistake_leaves_nothing_that_refuses_the_next(words: list[str], tmp_path: Path) -> None:
    run = ["train", *words, "--output_dir", tmp_path / "out", *OPTIONS]
    with pytest.raises(ValueError, match="max_length=99999 is more than"):
        bridge(*run, "--max_length", "99999")
    bridge(*run)
    assert json.loads((tmp_path / "out" / "cbd_bridge.json").read_text())["steps"] == 2


def test_what_is_missing_or_too_much(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output_dir is needed"):
        bridge("train", *words, *OPTIONS)
    with pytest.raises(ValueError, match="--source has no place in --method sequence"):
        bridge("train", *words, "--output_dir", tmp_path / "out", "--method", "sequence")
    with pytest.raises(ValueError, match="--source has no place in --method sequence"):
        bridge(
            "train", "--model=m", "--source=s", "--dataset=d", f"--output_dir={tmp_path / 'out'}", "--method=sequence"
        )
    (tmp_path / "list.yaml").write_text("- method\n")
    with pytest.raises(ValueError, match="list.yaml must hold `option: value` lines; it is a list"):
        bridge("train", *words, "--output_dir", tmp_path / "out", "--config", tmp_path / "list.yaml")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_an_own_directory_of_that_name_is_left_alone(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        bridge("train", *words, "--output_dir", tmp_path / "out", *OPTIONS)
    assert (tmp_path / "out.training" / "notes").read_text() == "mine" and not (tmp_path / "out").exists()


def test_options_of_loading_reach_the_student(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spied(*args: Any) -> None:
        seen.extend(args)
        raise KeyboardInterrupt

    monkeypatch.setattr("cbd_hf.distillation.bridge.stage.load_model", spied)
    more = ["--model_init_kwargs", '{"attn_implementation": "eager"}', "--trust_remote_code", "true"]
    with pytest.raises(KeyboardInterrupt):
        bridge("train", *words, "--output_dir", tmp_path / "out", *OPTIONS, *more)
    assert seen[1:] == [{"attn_implementation": "eager"}, True, torch.float32]


def test_only_the_tokenizer_of_a_cached_source_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def fetched(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert checkpoint("someone/source", weights=False) == str(tmp_path)
    assert "tokenizer.json" in asked and not any("safetensors" in pattern for pattern in asked)


def test_refused(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="full"):
        bridge("train", *words, "--output_dir", tmp_path / "full", *OPTIONS)
    without = [*words[:2], *words[4:]]
    with pytest.raises(ValueError, match="needs the source"):
        bridge("train", *without, "--output_dir", tmp_path / "bridge", *OPTIONS)
    with pytest.raises(ValueError, match="256 positions"):
        bridge("cache", *words, "--output_dir", tmp_path / "bridge", "--source_max_length", "300")
    with pytest.raises(ValueError, match="output_dir is needed"):
        bridge("cache", *words)
    with pytest.raises(ValueError, match="--source"):  # the answers are all that it learns from
        bridge("train", *words, "--method", "sequence", "--output_dir", tmp_path / "bridge", *OPTIONS)
    pair = [*words[:2], *words[4:]]
    with pytest.raises(FileNotFoundError, match="answers"):
        bridge("train", *pair, "--method", "sequence", "--output_dir", tmp_path / "bridge", *OPTIONS)
    assert (tmp_path / "full" / "notes").read_text() == "mine" and not (tmp_path / "bridge").exists()
