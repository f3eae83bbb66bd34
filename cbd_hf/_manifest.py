"""chain.json: what it must hold, read with errors that say what is wrong and written in one place."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cbd_hf._files import atomic_write_text, is_safe_relative


MANIFEST = "chain.json"
SCHEMA_VERSION = 1
ANCHORS = "anchors"

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "family": dict,
    "basis": str,
    "anchors": list,
    "metadata": dict,
    "created_with": dict,
}
_FAMILY_FIELDS: dict[str, type | tuple[type, ...]] = {
    "model_type": str,
    "vocab_size": int,
    "tie_word_embeddings": bool,
    "tokenizer_digest": (str, type(None)),
}
_ANCHOR_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "directory": str,
    "n_params": int,
    "config_digest": str,
    "files": dict,
    "cut": (dict, type(None)),
    "stage": (dict, type(None)),
}


def package_versions() -> dict[str, str]:
    """Versions of Python and the packages that decide what a chain's weights are."""
    versions = {"python": platform.python_version()}
    for package in ("cbd_hf", "huggingface_hub", "safetensors", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def new_manifest(
    family: Mapping[str, Any], basis: str, anchors: list[dict[str, Any]], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a fresh chain.json."""
    return {
        "schema_version": SCHEMA_VERSION,
        "family": dict(family),
        "basis": basis,
        "anchors": anchors,
        "metadata": dict(metadata),
        "created_with": package_versions(),
    }


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write chain.json in one step."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(directory / MANIFEST, text + "\n")


def read_manifest(directory: Path) -> dict[str, Any]:
    """
    The content of a chain directory's chain.json, checked.

    Raises:
        FileNotFoundError: there is no chain.json.
        ValueError: it is not valid, lacks a field, was written by a newer version, or names files outside the chain.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is not a chain: it has no {MANIFEST}. Give the directory that DistillationChain saved, or "
            "make a chain of separate checkpoints with DistillationChain.from_anchors."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Copy or download the chain again.") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(manifest).__name__}.")
    found = manifest.get("schema_version")
    # Before the other fields, which a newer version may have renamed.
    if isinstance(found, int) and not isinstance(found, bool) and found > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {found}, but this cbd_hf reads versions up to {SCHEMA_VERSION}. Upgrade "
            "cbd_hf to load this chain."
        )
    _check_fields(manifest, _FIELDS, str(path))
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema_version {found}; the allowed one is {SCHEMA_VERSION}.")
    _check_fields(manifest["family"], _FAMILY_FIELDS, f"{path}: family")
    _check_anchors(manifest["anchors"], str(path))
    return manifest


def _check_fields(value: Any, fields: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got a {type(value).__name__}.")
    missing = [name for name in fields if name not in value]
    if missing:
        raise ValueError(f"{where} lacks the field(s) {', '.join(missing)}. Copy or download the chain again.")
    for name, allowed in fields.items():
        item = value[name]
        # bool is an int to Python, but not to the schema.
        if not isinstance(item, allowed) or (allowed is int and isinstance(item, bool)):
            kinds = allowed if isinstance(allowed, tuple) else (allowed,)
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{where}: the field {name} is {item!r}, but must be a {names}.")


def _check_anchors(anchors: list[Any], where: str) -> None:
    if not anchors:
        raise ValueError(f"{where} lists no anchors. Copy or download the chain again.")
    for index, anchor in enumerate(anchors):
        here = f"{where}: anchors[{index}]"
        _check_fields(anchor, _ANCHOR_FIELDS, here)
        here = f"{here} ({anchor['name']})"
        if anchor["n_params"] <= 0:
            raise ValueError(f"{here}: n_params is {anchor['n_params']}, but must be positive.")
        if not is_safe_relative(anchor["directory"]):
            raise ValueError(
                f"{here}: the directory {anchor['directory']!r} leaves the chain. Only relative paths without '..' "
                "are allowed; do not use a chain from a source that you do not trust."
            )
        for name, entry in anchor["files"].items():
            if not is_safe_relative(name):
                raise ValueError(
                    f"{here}: the file name {name!r} leaves the anchor's directory. Only relative paths without '..' "
                    "are allowed; do not use a chain from a source that you do not trust."
                )
            _check_fields(entry, {"size": int, "sha256": str}, f"{here}: files[{name!r}]")
        if "config.json" not in anchor["files"] or not any(name.endswith(".safetensors") for name in anchor["files"]):
            raise ValueError(f"{here}: files must list config.json and at least one .safetensors file.")
    names = [anchor["name"] for anchor in anchors]
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: two anchors have the same name; got {names}.")
    sizes = [anchor["n_params"] for anchor in anchors]
    if any(larger <= smaller for larger, smaller in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"{where}: anchors must be listed from the largest to the smallest, got n_params {sizes}.")


__all__ = [
    "ANCHORS",
    "MANIFEST",
    "SCHEMA_VERSION",
    "new_manifest",
    "package_versions",
    "read_manifest",
    "write_manifest",
]
