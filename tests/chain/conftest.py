from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cbd_hf.chain import DistillationChain
from tests.chain.helpers import (
    LAYERS,
    make_model,
    make_tokenizer,
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Tiny GPT-2 checkpoints with tokenizer; never to be written to."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, layers in LAYERS.items():
        make_model(layers).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in LAYERS}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A chain of all three; never to be written to."""
    path = tmp_path_factory.mktemp("saved") / "chain"
    DistillationChain.from_anchors([checkpoints[name] for name in LAYERS], path)
    return path


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A chain to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "chain"))
