"""`cbd bridge generate`: from a model and a file of instructions to what training reads."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cbd_hf import cli
from cbd_hf.commands import bridge
from cbd_hf.data.instructions import load_instructions
from cbd_hf.distillation.answers import AnswersManifest, AnswersSettings, load_answers

from ..distillation.answers.helpers import questions, rows, save_source


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bridge")
    # The words of the paper's prompt are all unknown to the tiny tokenizer, but count.
    save_source(directory / "source", max_position_embeddings=256)
    lines = [{"instruction": f"w{i}", "context": "w7" * (i % 2), "response": f"w{i} w{i + 1}"} for i in range(9)]
    (directory / "dolly.jsonl").write_text("\n".join(map(json.dumps, lines)))
    questions(7).to_json(directory / "questions.jsonl")
    return directory


def command(material: Path, output: Path, data: str, *options: str) -> list[str]:
    arguments = ["--source", str(material / "source"), "--dataset", str(material / data), "--output_dir", str(output)]
    return ["generate", *arguments, "--max_new_tokens", "6", "--shard_rows", "4", *options]


def test_generate(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "answers"
    assert cli.main(["bridge", *command(material, output, "dolly.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "9 to 9 prompts" in printed and "left out" not in printed
    answers, _ = load_answers(output, verify="full")
    assert answers["prompt"][:] == load_instructions(material / "dolly.jsonl")["prompt"][:]
    manifest = AnswersManifest.read(output)
    assert manifest.settings == AnswersSettings(max_new_tokens=6, shard_rows=4)
    assert (manifest.source.name, manifest.data.name) == (
        str(material / "source"),
        str(material / "dolly.jsonl"),
    )
    assert cli.main(["bridge", *command(material, output, "dolly.jsonl")]) == 0
    assert "nothing to add" in capsys.readouterr().out
    assert cli.main(["bridge", *command(material, output, "dolly.jsonl", "--seed", "1")]) == 2
    assert "seed: 0, not 1" in capsys.readouterr().err


def test_generate_from_a_recipe(material: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    config = tmp_path / "generate.yaml"
    config.write_text("data_format: columns\nsource_prompt: chat\nmax_prompt_length: 8\ntemperature: 0.0\n")
    arguments = command(material, tmp_path / "answers", "questions.jsonl", "--config", str(config))
    done = subprocess.run(
        [sys.executable, str(root / "recipes" / "bridge.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Three tokens of the template stand beside the prompt's own.
    kept = [text for text in questions(7)["prompt"] if len(text.split()) <= 5]
    assert [row["prompt"] for row in rows(tmp_path / "answers")] == kept and 0 < len(kept) < 7
    assert f"{7 - len(kept)} prompts longer than max_prompt_length" in done.stdout


@pytest.mark.parametrize("stage", ["train", "cache"])
def test_other_stages(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, called = importlib.import_module(f"cbd_hf.commands.bridge_{stage}"), []
    monkeypatch.setattr(module, stage, called.append)
    bridge.main([stage, "--config", "a.yaml"])
    assert called == [["--config", "a.yaml"]]


@pytest.mark.parametrize("arguments", [[], ["distil"]])
def test_no_such_stage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bridge.main(arguments)
    assert stopped.value.code == 2
    assert "cbd bridge: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--help"], "generate: the source answers"), (["generate", "--help"], "--chat_template_kwargs")],
)
def test_help(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bridge", *arguments])
    assert stopped.value.code == 0
    assert expected in capsys.readouterr().out


def test_options_are_those_of_the_settings() -> None:
    own = {field.name: field.default for field in dataclasses.fields(bridge.GenerateArguments)}
    settings = {field.name: field.default for field in dataclasses.fields(AnswersSettings)}
    assert {name: own[name] for name in bridge.SETTINGS} == settings
