"""Whole chain builds in two real processes end where one process with the same global batch does."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cbd_hf import DistillationChain

from ..models import random_model, tiny_config, tiny_tokenizer, words


ROOT = Path(__file__).parents[2]


def launch(recipe: Path, output: Path, per_device: int, *launcher: str, **environment: str) -> DistillationChain:
    """Build a chain with `accelerate launch` (or plainly, without launcher options)."""
    program = [sys.executable]
    if launcher:
        program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launcher]
    command = [
        *program,
        str(ROOT / "recipes/build_chain.py"),
        "--config",
        str(recipe),
        f"--output_dir={output}",
        f"--per_device_train_batch_size={per_device}",
    ]
    result = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return DistillationChain.from_pretrained(output)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    random_model(tiny_config("llama", layers=5), std=0.1).save_pretrained(directory / "source")
    tiny_tokenizer().save_pretrained(directory / "source")
    rng = random.Random(0)
    text = directory / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": words(rng, rng.randint(5, 30))}) for _ in range(60)))
    path = directory / "recipe.yaml"
    values = {
        "source": str(directory / "source"),
        "dataset": str(text),
        "anchors": [
            {"name": "mid", "num_hidden_layers": 4},
            {"name": "small", "num_hidden_layers": 3, "hidden_size": 24},
        ],
        "eval_documents": 4,
        "calibration_documents": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "max_length": 32,
        "max_grad_norm": 0.5,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def single(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillationChain:
    return launch(recipe, tmp_path_factory.mktemp("single") / "chain", 4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["cpu_2proc", "zero3"])
def test_two_processes_build_the_same_chain(
    name: str, recipe: Path, single: DistillationChain, tmp_path: Path
) -> None:
    environment = {"DS_ACCELERATOR": "cpu"}
    options = [f"--config_file={ROOT / f'recipes/accelerate_configs/{name}.yaml'}"]
    if name == "cpu_2proc":
        environment["ACCELERATE_USE_CPU"] = "true"
    else:
        pytest.importorskip("deepspeed")
        options += ["--num_processes=2", "--mixed_precision=no"]
    chain = launch(recipe, tmp_path / "chain", 2, *options, **environment)
    assert [anchor.stage["tokens"] for anchor in chain] == [anchor.stage["tokens"] for anchor in single]
    for one, other in zip(single, chain, strict=True):
        expected, actual = (load_file(anchor.path / "model.safetensors") for anchor in (one, other))
        assert expected.keys() == actual.keys()
        for key in expected:
            # Three steps of AdamW at 1e-2 move weights by up to 3e-2.
            assert torch.allclose(actual[key], expected[key], atol=2e-3), (one.name, key)
