"""Files and directories that are either whole or not there: hashing, atomic writes, staged directories."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


_BLOCK = 1 << 22
_PROGRESS_FROM = 200 * 10**6
_STAGING_MARK = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Writers in other languages say it in words, and torch.save's only that it could not write.
_FULL_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter",
    "iostream error",
    "unexpected pos",
)


def sha256_of(path: str | Path) -> str:
    """
    Hexadecimal SHA-256 of a file.

    A progress bar is shown for files of 200 MB and more when standard error is a terminal.

    Args:
        path (`str` or `Path`): the file.

    Raises:
        OSError: the file cannot be read.
    """
    from tqdm import tqdm

    path = Path(path)
    size = path.stat().st_size
    silent = size < _PROGRESS_FROM or not sys.stderr.isatty()
    digest = hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(total=size, desc=f"sha256 {path.name}", unit="B", unit_scale=True, disable=silent) as bar,
    ):
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def canonical_digest(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def is_safe_relative(name: str) -> bool:
    """Whether `name` is a relative path that stays below the directory it is joined to, on every platform."""
    if not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).drive:
        return False
    return bool(path.parts) and ".." not in path.parts


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, where the platform can."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Make every file below a directory durable, and their names."""
    for root, _, names in os.walk(directory):
        for name in names:
            # Windows can flush only a file that is open for writing.
            with open(os.path.join(root, name), "rb+" if os.name == "nt" else "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(root))


class DiskFullError(OSError):
    """A file could not be written for lack of space; what was there before is unharmed."""


@contextmanager
def explain_full_disk(
    directory: str | Path, advice: str = "Free some space and run the same again."
) -> Iterator[None]:
    """
    Raise what goes wrong inside for lack of space as one error that says where, and how much is free.

    Args:
        directory (`str` or `Path`): what is being written below; the file is named, or the last one that was begun.
        advice (`str`, *optional*): the message's last sentence.

    Raises:
        DiskFullError: the disk, a quota or the process's limit of a file's size is exhausted. Other errors pass.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        raise DiskFullError(errno.ENOSPC, f"{_describe_full(error, Path(directory))} {advice}") from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _describe_full(error: BaseException, directory: Path) -> str:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = f"{shutil.disk_usage(existing).free:,} bytes are free there."
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if named:
        return f"Writing {os.fsdecode(named)} failed: {reason}. {free}"
    written = [(path.stat().st_mtime_ns, path) for path in directory.rglob("*") if path.is_file()]
    if not written:
        return f"Writing into {directory} failed: {reason}. {free}"
    last = max(written)[1]
    return (
        f"Writing into {last.parent} failed: {reason}. {free} The last file is {last.name}, of "
        f"{last.stat().st_size:,} bytes."
    )


def atomic_write_text(path: str | Path, text: str) -> None:
    """
    Write a UTF-8 text file so that a reader sees the old text or the new one, never a part, even after a crash.

    Args:
        path (`str` or `Path`): the file, created or replaced.
        text (`str`): its new content.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{_STAGING_MARK}{uuid.uuid4().hex[:12]}")
    try:
        with (
            explain_full_disk(temporary, f"{path} is as it was. Free some space and run the same again."),
            open(temporary, "w", encoding="utf-8", newline="\n") as file,
        ):
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def check_output_directory(directory: str | os.PathLike[str]) -> Path:
    """
    The absolute path of a directory that may be written: one that does not exist or is empty.

    Args:
        directory (`str` or `os.PathLike`): the wanted output directory.

    Raises:
        FileExistsError: it is a file, or a directory that holds something.
    """
    # Resolved, because a symbolic link to an empty directory cannot be replaced by a rename.
    resolved = Path(directory).resolve()
    if resolved.is_dir():
        if any(resolved.iterdir()):
            raise FileExistsError(
                f"The output directory {directory} exists and is not empty; nothing was written. Choose another "
                "directory, or remove this one first."
            )
    elif resolved.exists():
        raise FileExistsError(f"The output directory {directory} is an existing file. Choose another directory.")
    return resolved


@contextmanager
def staging_directory(final: str | Path) -> Iterator[Path]:
    """
    A temporary directory beside `final` to be filled and then handed to [`commit_directory`].

    Whatever is still in it when the block ends, by an error or without a commit, is removed.

    Args:
        final (`str` or `Path`): where the directory will go. Its parent is created if needed.

    Raises:
        DiskFullError: what is written inside does not fit.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.with_name(f".{final.name}{_STAGING_MARK}{uuid.uuid4().hex[:12]}")
    staging.mkdir()
    try:
        with explain_full_disk(staging):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_staging(path: Path) -> bool:
    """Whether a path has the name of a temporary file or directory that a killed process left behind."""
    return path.name.startswith(".") and _STAGING_MARK in path.name


def remove_staging(final: str | Path) -> None:
    """Remove what killed processes staged for `final`. No other process may be writing it."""
    final = Path(final)
    for path in final.parent.glob(f".{glob.escape(final.name)}{_STAGING_MARK}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def commit_directory(staging: str | Path, final: str | Path) -> None:
    """
    Move a finished directory into place in one step, after its content has reached the disk.

    Args:
        staging (`str` or `Path`): the finished directory, on the same file system as `final`.
        final (`str` or `Path`): its new path. It must not exist, or be an empty directory.

    Raises:
        FileExistsError: `final` exists and is not empty. Neither directory is changed.
    """
    target = check_output_directory(final)
    sync_tree(Path(staging))
    if os.name == "nt" and target.exists():
        target.rmdir()
    try:
        os.replace(staging, target)
    except OSError as error:
        # Another process may have filled it since the check.
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            check_output_directory(final)
        raise
    sync_directory(target.parent)


def merge_directory(staging: str | Path, final: str | Path, keys: Sequence[str] = ()) -> None:
    """
    Move the finished entries of a directory into one that may hold others, such as checkpoints.

    An empty or missing `final` is replaced in one step. Otherwise every entry is moved by a rename, and the files
    named in `keys`, without which nobody reads the others, are removed first and moved last: a process that is killed
    in between leaves a directory that does not load, never one of two halves.

    Args:
        staging (`str` or `Path`): the finished directory, on the same file system as `final`.
        final (`str` or `Path`): where to. Entries of the same name are replaced.
        keys (`Sequence[str]`, *optional*): names of files, such as `config.json`.
    """
    staging, target = Path(staging), Path(final).resolve()
    if not target.is_dir() or not any(target.iterdir()):
        commit_directory(staging, final)
        return
    sync_tree(staging)
    for name in keys:
        (target / name).unlink(missing_ok=True)
    sync_directory(target)
    for path in sorted(staging.iterdir(), key=lambda path: path.name in keys):
        if path.is_dir() and (target / path.name).exists():
            shutil.rmtree(target / path.name)
        if path.name in keys:
            sync_directory(target)
        os.replace(path, target / path.name)
    sync_directory(target)
    staging.rmdir()


__all__ = [
    "DiskFullError",
    "atomic_write_text",
    "canonical_digest",
    "check_output_directory",
    "commit_directory",
    "explain_full_disk",
    "is_safe_relative",
    "is_staging",
    "merge_directory",
    "remove_staging",
    "sha256_of",
    "staging_directory",
    "sync_directory",
    "sync_tree",
]
