from __future__ import annotations

from pathlib import Path

import pytest

from .helpers import build, save_source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source on disk; never to be written to."""
    return save_source(tmp_path_factory.mktemp("answers") / "source")


@pytest.fixture(scope="session")
def answered(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sampled answers to twenty prompts; never to be written to."""
    directory = tmp_path_factory.mktemp("answered") / "answers"
    build(source, directory)
    return directory
