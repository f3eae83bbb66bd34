"""Whole chain builds in two real processes end where one process with the same global batch does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cbd_hf import DistillationChain

from ..distillation.test_bridge_chain import build as build_here
from ..distillation.test_bridge_chain import recipe as bridge_recipe  # noqa: F401
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


BRIDGES = {
    "overlap_kl": {"training": {"max_steps": 2, "learning_rate": 1e-2}},
    "sequence": {"answers": {"max_new_tokens": 6, "shard_rows": 8}, "training": {"max_steps": 2}},
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("method", BRIDGES)
@pytest.mark.parametrize("config", ["cpu_2proc", "zero3"])
def test_two_processes_build_the_same_bridge(
    config: str,
    method: str,
    bridge_recipe: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    if config == "zero3":
        pytest.importorskip("deepspeed")
    bridge_recipe["bridge"] |= {"method": method, **BRIDGES[method]}
    bridge_recipe["anchors"] = bridge_recipe["anchors"][:1]
    expected = build_here(bridge_recipe | {"output_dir": str(tmp_path / "single"), "per_device_train_batch_size": 2})
    del bridge_recipe["output_dir"], bridge_recipe["per_device_train_batch_size"], bridge_recipe["save_steps"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(bridge_recipe))
    chain = build(config, path, tmp_path / "chain", 1)
    assert [anchor.stage["tokens"] for anchor in chain] == [anchor.stage["tokens"] for anchor in expected]
    if method == "sequence":
        answers = [sorted((tmp_path / f"{name}.answers").glob("*.jsonl")) for name in ("single", "chain")]
        assert len(answers[0]) == 3 and [p.read_bytes() for p in answers[0]] == [p.read_bytes() for p in answers[1]]
        return  # the rest is SFTTrainer's
    for one, other in zip(expected, chain, strict=True):
        wanted, actual = (load_file(anchor.path / "model.safetensors") for anchor in (one, other))
        for key in wanted:
            # Two steps of AdamW at 1e-2 move weights by up to 2e-2.
            assert torch.allclose(actual[key], wanted[key], atol=2e-3), (one.name, key)
