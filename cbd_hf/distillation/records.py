"""What manifests of generated files have in common: their JSON, checked records, and files that are whole."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbd_hf._files import atomic_write_text, canonical_digest, is_safe_relative, sha256_of


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


@dataclass(frozen=True)
class TeacherRecord:
    """
    Args:
        name (`str`): as it was given.
        sha256 (`str`): digest of the sha256 of its weight files.
        dtype (`str`): of its weights while it ran.
        vocab_size (`int`): rows of its head.
        hidden_size (`int`): width of its hidden states.
    """

    name: str
    sha256: str
    dtype: str
    vocab_size: int
    hidden_size: int


@dataclass(frozen=True)
class ShardRecord:
    """
    Args:
        file (`str`): name in the directory of the manifest.
        rows, tokens, bytes (`int`): rows of the dataset, supervised positions (or tokens of answers), size.
        sha256 (`str`): of the file.
    """

    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


def write_manifest(path: Path, manifest: Any, schema_version: int) -> None:
    """Write a dataclass as JSON, with the version of its fields, in one step."""
    content = {"schema_version": schema_version, **dataclasses.asdict(manifest)}
    atomic_write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_manifest(path: Path, schema_version: int, missing: str, remedy: str) -> dict[str, Any]:
    """
    The fields of a manifest, without its version.

    Args:
        path (`Path`): of the file.
        schema_version (`int`): what this package reads.
        missing (`str`): message if there is no such file.
        remedy (`str`): a message's last sentence.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(missing)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). {remedy}") from error
    found = content.pop("schema_version", None) if isinstance(content, dict) else None
    if found != schema_version:
        hint = "Upgrade cbd_hf." if isinstance(found, int) and found > schema_version else remedy
        raise ValueError(f"{path} has schema_version {found}, but this cbd_hf reads {schema_version}. {hint}")
    return content


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


def weights_digest(directory: str | os.PathLike[str]) -> str:
    """
    Digest of a checkpoint's weight files: of the sha256 of each, by name.

    Raises:
        ValueError: the directory has no .safetensors files.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has no .safetensors files, by which a teacher is recognised. Convert it first.")
    return canonical_digest({path.name: sha256_of(path) for path in files})


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's vocabulary, as in a chain's manifest."""
    return canonical_digest(tokenizer.get_vocab())


__all__ = [
    "VERIFY",
    "ShardRecord",
    "TeacherRecord",
    "check_files",
    "check_names",
    "read_manifest",
    "read_record",
    "tokenizer_digest",
    "weights_digest",
    "write_manifest",
]
