"""`cbd cache`: from a model and a file to what training reads, and what `cbd inspect` says of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trl import SFTConfig

from cbd_hf import cli
from cbd_hf.commands.cache import PREPARATION, CacheArguments
from cbd_hf.distillation.cache import TeacherCache

from ..distillation.cache.helpers import save_teacher
from ..models import answers_dataset


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    save_teacher(directory / "teacher")
    answers_dataset(12).to_json(directory / "answers.jsonl")
    (directory / "text.jsonl").write_text("\n".join(json.dumps({"body": f"w{i} w{i + 1} w3"}) for i in range(9)))
    return directory


def command(files: Path, output: Path, data: str = "answers.jsonl", *options: str) -> list[str]:
    arguments = ["cache", "--teacher", str(files / "teacher"), "--dataset", str(files / data)]
    return [*arguments, "--output_dir", str(output), "--k", "4", "--shard_rows", "5", *options]


def test_cache(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, columns = tmp_path / "cache", ("--data_format", "columns")
    assert cli.main(command(files, output, "answers.jsonl", *columns)) == 0
    printed = capsys.readouterr().out
    cache = TeacherCache.from_pretrained(output, verify="full")
    assert f"{cache.manifest.bytes_per_token:.1f} per supervised token" in printed and "12 rows" in printed
    assert cli.main(command(files, output, "answers.jsonl", *columns)) == 0
    assert "nothing to add" in capsys.readouterr().out
    text = ("--dataset_text_field", "body")
    assert cli.main(command(files, output, "text.jsonl", *text)) == 2
    assert "--append true" in capsys.readouterr().err
    assert cli.main(command(files, output, "text.jsonl", *text, "--append", "true")) == 0
    assert len(TeacherCache.from_pretrained(output)) == 21
    capsys.readouterr()
    assert cli.main(["inspect", str(output), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert (
        "the 4 most likely tokens" in printed and "match their sha256" in printed and "text.jsonl: 9 rows" in printed
    )
    assert cli.main(["inspect", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["k"] == 4


def test_sampled_from_a_recipe(files: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    arguments = command(files, tmp_path / "cache", "answers.jsonl", "--data_format", "columns")[1:]
    options = ["--variant", "sampled", "--n_samples", "6", "--sample_seed", "3", "--dtype", "float32"]
    program = [sys.executable, str(root / "recipes" / "cache_teacher.py")]
    config = ["--config", str(root / "recipes" / "configs" / "cache_teacher.yaml")]
    done = subprocess.run(
        [*program, *config, *arguments, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    settings = TeacherCache.from_pretrained(tmp_path / "cache").manifest.settings
    assert (settings.variant, settings.n_samples, settings.seed) == ("sampled", 6, 3)


def test_preparation_has_the_trainers_defaults() -> None:
    own = {field.name: field.default for field in dataclasses.fields(CacheArguments)}
    trainers = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    assert {name: own[name] for name in PREPARATION} == {name: trainers[name] for name in PREPARATION}


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["cache", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "cbd cache --teacher MODEL" in printed and "--append" in printed
