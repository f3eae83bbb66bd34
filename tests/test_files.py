from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cbd_hf._files import atomic_write_text, commit_directory, is_safe_relative, sha256_of, staging_directory
from tests.chain.helpers import (
    snapshot,
)


def test_atomic_write_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()

    def fail(*args: Any) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        atomic_write_text(path, "new")
    assert snapshot(tmp_path) == {"a.txt": "é\n".encode()}


def test_commit_directory_refuses_existing(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    with staging_directory(tmp_path / "final") as staging:
        (staging / "a").write_text("a")
        (tmp_path / "final" / "b").write_text("b")
        with pytest.raises(FileExistsError, match="not empty"):
            commit_directory(staging, tmp_path / "final")
        assert (staging / "a").is_file()
    assert snapshot(tmp_path) == {"final/b": b"b"}


def test_sha256_of(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a", True),
        ("a/b.json", True),
        ("..a", True),
        ("", False),
        (".", False),
        ("..", False),
        ("a/../b", False),
        ("/a", False),
        ("a\\b", False),
        ("C:a", False),
        ("a\0", False),
    ],
)
def test_is_safe_relative(name: str, safe: bool) -> None:
    assert is_safe_relative(name) is safe


def test_import_is_cheap() -> None:
    code = "import sys, cbd_hf.chain; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
