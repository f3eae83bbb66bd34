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
