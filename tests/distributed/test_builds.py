"""Whole chain builds in two real processes end where one process with the same global batch does."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cbd_hf import DistillationChain

from ..models import random_model, tiny_config, tiny_tokenizer, words
from .launching import launch


def build(config: str, recipe: Path, output: Path, per_device: int) -> DistillationChain:
    """Build a chain by `accelerate launch` with a config of recipes/accelerate_configs."""
    launch(
        config,
        "-m",
        "tests.distributed.recipe_worker",
        "recipes/build_chain.py",
        "--config",  # apart from its value: TrlParser does not find it otherwise
        str(recipe),
        f"--output_dir={output}",
        f"--per_device_train_batch_size={per_device}",
    )
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
    return build("single", recipe, tmp_path_factory.mktemp("single") / "chain", 4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["cpu_2proc", "zero3", "fsdp2"])
def test_two_processes_build_the_same_chain(
    config: str, recipe: Path, single: DistillationChain, tmp_path: Path
) -> None:
    if config == "zero3":
        pytest.importorskip("deepspeed")
    chain = build(config, recipe, tmp_path / "chain", 2)
    assert [anchor.stage["tokens"] for anchor in chain] == [anchor.stage["tokens"] for anchor in single]
    for one, other in zip(single, chain, strict=True):
        expected, actual = (load_file(anchor.path / "model.safetensors") for anchor in (one, other))
        assert expected.keys() == actual.keys()
        for key in expected:
            # Three steps of AdamW at 1e-2 move weights by up to 3e-2.
            assert torch.allclose(actual[key], expected[key], atol=2e-3), (one.name, key)
