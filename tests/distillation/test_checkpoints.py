"""Which checkpoints count as complete, and that the last of them is never deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cbd_hf.distillation.checkpoints import (
    COMPLETE,
    complete_checkpoints,
    discard,
    is_complete,
    last_complete_checkpoint,
    last_written_checkpoint,
    mark_complete,
    remove_incomplete,
    rotate,
)


def write(directory: Path, step: int, complete: bool = True) -> Path:
    path = directory / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "global_step" / "optimizer.pt").write_bytes(b"moments")
    if complete:
        mark_complete(path)
    return path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_newest_by_number(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        write(tmp_path, step)
    write(tmp_path, 200, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert names(complete_checkpoints(tmp_path)) == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert last_complete_checkpoint(tmp_path, before=100) == str(tmp_path / "checkpoint-10")
    assert last_complete_checkpoint(tmp_path, before=9) is None
    assert last_complete_checkpoint(tmp_path / "none") is None


def test_a_file_that_is_missing_or_cut_makes_it_incomplete(tmp_path: Path) -> None:
    for step, damage in enumerate((Path.unlink, lambda path: os.truncate(path, 3))):
        path = write(tmp_path, step)
        assert is_complete(path)
        damage(path / "global_step" / "optimizer.pt")
        assert not is_complete(path)


@pytest.mark.parametrize("mark", ["", "{}", "[]", '{"model.safetensors": 7', '"text"'])
def test_a_broken_mark_is_none(tmp_path: Path, mark: str) -> None:
    path = write(tmp_path, 1)
    (path / COMPLETE).write_text(mark)
    assert not is_complete(path)


def test_mark_comes_after_all_files_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 1, complete=False)
    synced: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(handle: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def record_mark(source: object, target: object) -> None:
        files = {str(file) for file in path.rglob("*")} | {str(path), str(tmp_path)}
        assert files <= set(synced), "marked before it was safe"
        replace(source, target)  # type: ignore[arg-type]
        synced.append("marked")

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_mark)
    mark_complete(path)
    assert "marked" in synced and is_complete(path)


def test_rotation_counts_complete_ones_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    write(tmp_path, 4, complete=False)
    rotate(tmp_path, None)
    rotate(tmp_path, 0)
    assert len(complete_checkpoints(tmp_path)) == 3
    rotate(tmp_path, 1, keep=str(tmp_path / "checkpoint-1"))
    assert names(complete_checkpoints(tmp_path)) == ["checkpoint-1", "checkpoint-3"]
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_an_interrupted_deletion_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    discard(path)
    assert path.is_dir() and not is_complete(path)


def test_checkpoints_of_a_plain_train_have_no_mark(tmp_path: Path) -> None:
    for step, names in ((5, ["trainer_state.json"]), (10, ["trainer_state.json"]), (15, ["model.safetensors"])):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        for name in names:
            (directory / name).write_text("{}")
    assert last_complete_checkpoint(tmp_path) is None
    assert last_written_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_written_checkpoint(tmp_path, before=10) == str(tmp_path / "checkpoint-5")
    assert last_written_checkpoint(tmp_path, before=5) is None
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"epoch"')  # the disk was full
    assert last_written_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
