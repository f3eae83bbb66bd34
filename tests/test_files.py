from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cbd_hf._files import (
    DiskFullError,
    atomic_write_text,
    commit_directory,
    explain_full_disk,
    is_safe_relative,
    merge_directory,
    remove_staging,
    sha256_of,
    staging_directory,
)
from tests.chain.helpers import snapshot


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


def write_files(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        path = directory / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def test_merge_directory(tmp_path: Path) -> None:
    final = write_files(tmp_path / "final", config_json="old", notes_txt="mine", merged__a="old", merged__b="old")
    merge_directory(write_files(tmp_path / "new", config_json="new", merged__a="new"), final, ["config.json"])
    assert snapshot(tmp_path) == {"final/config.json": b"new", "final/merged/a": b"new", "final/notes.txt": b"mine"}
    merge_directory(write_files(tmp_path / "new", config_json="x"), tmp_path / "fresh")
    assert snapshot(tmp_path / "fresh") == {"config.json": b"x"}


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_interrupted_merge_leaves_no_config(moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = write_files(tmp_path / "final", config_json="old", a="old", b="old")
    left, replace = [moves], os.replace

    def fail(*args: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*args)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        merge_directory(write_files(tmp_path / "new", config_json="new", a="new", b="new"), final, ["config.json"])
    assert "config.json" not in snapshot(final)


def test_remove_staging(tmp_path: Path) -> None:
    write_files(tmp_path / ".a[1].tmp-0123", x="x")
    write_files(tmp_path, other_txt="mine")
    (tmp_path / ".a[1].tmp-4567").write_text("x")
    write_files(tmp_path / ".a1.tmp-0123", x="x")
    remove_staging(tmp_path / "a[1]")
    assert sorted(snapshot(tmp_path)) == [".a1.tmp-0123/x", "other.txt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_full_disk_is_explained_once(error: Exception, tmp_path: Path) -> None:
    write_files(tmp_path, first_bin="a")
    with pytest.raises(DiskFullError, match=r"bytes are free there.*first\.bin, of 1 bytes\. Inner\.$") as caught:
        with explain_full_disk(tmp_path, "Outer."), explain_full_disk(tmp_path, "Inner."):
            raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.__cause__ is error
    with pytest.raises(RuntimeError, match="^other$"), explain_full_disk(tmp_path):
        raise RuntimeError("other")


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
