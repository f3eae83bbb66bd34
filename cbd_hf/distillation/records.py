"""What manifests of generated files have in common: checked records, and files that are whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hf._files import is_safe_relative, sha256_of


if TYPE_CHECKING:
    from cbd_hf.distillation.cache.manifest import ShardRecord

VERIFY = ("none", "size", "full")
_ALLOWED: dict[str, Any] = {
    "int": int,
    "str": str,
    "bool": bool,
    "float": (int, float),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "dict[str, Any] | None": (dict, type(None)),
}


def read_record(kind: Any, content: Any, where: str, remedy: str) -> Any:
    """
    One dataclass of a JSON object with exactly its fields.

    Args:
        kind (`type`): the dataclass, its annotations among those of JSON's own types.
        content (`Any`): the JSON value.
        where (`str`): the file and the place in it, for messages.
        remedy (`str`): a message's last sentence.

    Raises:
        ValueError: a field is missing, unknown, of another type or out of its range.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(content).__name__}. {remedy}")
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    if types.keys() != content.keys():
        wrong = sorted(types.keys() ^ content.keys())
        raise ValueError(f"{where}: the field(s) {', '.join(wrong)} are missing or unknown. {remedy}")
    for name, value in content.items():
        wanted = _ALLOWED[types[name]]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{where}: {name} is {value!r}, but must be a {types[name]}. {remedy}")
        if wanted is int and name != "seed" and value < 0:
            raise ValueError(f"{where}: {name} is {value}, but cannot be negative. {remedy}")
    try:
        return kind(**content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_names(shards: Sequence[ShardRecord], where: str, whole: str) -> None:
    """
    Check that the files of shards lie in the directory of their manifest.

    Args:
        shards (`list[ShardRecord]`): what the manifest lists.
        where (`str`): the manifest, for the message.
        whole (`str`): what the directory is, such as `"cache"`.

    Raises:
        ValueError: a name leaves the directory.
    """
    for shard in shards:
        if not is_safe_relative(shard.file):
            raise ValueError(
                f"{where}: the file name {shard.file!r} leaves the {whole}. Only relative paths without '..' are "
                f"allowed; do not use a {whole} from a source that you do not trust."
            )


def check_files(directory: Path, shards: Sequence[ShardRecord], verify: str, remedy: str) -> None:
    """
    Check that every shard is there and whole.

    Args:
        directory (`Path`): of the manifest.
        shards (`list[ShardRecord]`): what it lists.
        verify (`str`): `"size"`, `"full"` (sha256 of every file) or `"none"`.
        remedy (`str`): a message's last sentence.

    Raises:
        ValueError: a shard is missing or broken, or `verify` is unknown.
    """
    if verify not in VERIFY:
        raise ValueError(f"verify={verify!r} is unknown; choose 'none', 'size' or 'full'.")
    for shard in shards if verify != "none" else ():
        path = directory / shard.file
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != shard.bytes:
            problem = f"has {path.stat().st_size} bytes instead of {shard.bytes}"
        elif verify == "full" and sha256_of(path) != shard.sha256:
            problem = "does not match its sha256"
        else:
            continue
        raise ValueError(f"Shard {path} {problem}. {remedy}")


__all__ = ["VERIFY", "check_files", "check_names", "read_record"]
