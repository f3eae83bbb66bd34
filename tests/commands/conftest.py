from __future__ import annotations

from pathlib import Path

import pytest

from cbd_hf.chain import DistillationChain
from tests.models import random_model, tiny_config, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two llama anchors, 2 x 16 and 4 x 32, with a tokenizer; never to be written to."""
    path = tmp_path_factory.mktemp("tiny") / "chain"
    models = [random_model(tiny_config("llama", layers=layers, heads=heads)) for layers, heads in ((4, 4), (2, 2))]
    DistillationChain.from_anchors(models, path, tokenizer=tiny_tokenizer(), names=["large", "small"])
    return path
