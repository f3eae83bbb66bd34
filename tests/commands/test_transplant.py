"""`cbd transplant`: from a model and a tokenizer to a checkpoint that has both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hf import cli

from ..models import random_model, tiny_config
from ..tokenization.tokenizers import byte_level


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("transplant")
    for name, size in (("model", 300), ("donor", 360)):
        tokenizer = byte_level(size=size)
        random_model(tiny_config("llama", layers=1, vocab_size=len(tokenizer))).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory


def command(files: Path, output: Path, *options: str) -> list[str]:
    paths = ["--model", str(files / "model"), "--tokenizer", str(files / "donor"), "--output_dir", str(output)]
    return ["transplant", *paths, *options]


def test_transplant(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(files, tmp_path / "mean", "--pad_to_multiple_of", "128")) == 0
    printed = capsys.readouterr().out
    assert "384 embeddings; 302 tokens copied, 60 made by mean, 0 the mean of all." in printed
    omp = ["--method", "omp", "--donor", str(files / "donor"), "--k", "4", "--rescale", "true"]
    assert cli.main(command(files, tmp_path / "omp", *omp)) == 0
    assert "60 made by omp" in capsys.readouterr().out
    for name in ("mean", "omp"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokens = tokenizer("the cat sat on the mat", return_tensors="pt")["input_ids"]
        assert model(input_ids=tokens).logits.isfinite().all() and len(tokenizer) == 362


def test_mistakes(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(files, tmp_path / "out", "--method", "omp")) == 2
    assert "needs a donor" in capsys.readouterr().err
    assert cli.main(command(files, files)) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main(command(files, tmp_path / "out", "--donor", "./absent", "--method", "omp")) == 2
    assert "./absent does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_recipe_is_the_command() -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "transplant_vocabulary.py"
    done = subprocess.run([sys.executable, str(recipe), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "cbd transplant --model MODEL" in done.stdout, done.stderr
