"""A tiny model with its tokenizer."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..test_clients import make_target


@pytest.fixture(scope="session")
def target_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_target(tmp_path_factory.mktemp("made") / "model"))


@pytest.fixture
def model(target_directory: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(target_directory)


@pytest.fixture
def tokenizer(target_directory: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(target_directory)
