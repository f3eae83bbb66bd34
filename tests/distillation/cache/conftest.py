"""A teacher, and a cache of it that is never written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from .helpers import build, save_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="session")
def cached(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of eight, eight and four rows."""
    directory = tmp_path_factory.mktemp("cached") / "cache"
    build(teacher, directory)
    return directory
