"""cache.json: what a teacher cache holds and what it was made with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd_hf.distillation.records import (
    ShardRecord,
    TeacherRecord,
    check_files,
    check_names,
    read_manifest,
    read_record,
    write_manifest,
)


MANIFEST = "cache.json"
SCHEMA_VERSION = 1
VARIANTS = ("top_k", "sampled")
DTYPES = ("float16", "float32", "bfloat16")
LARGEST_SAMPLE = 32767
_REMEDY = "Copy the cache again, or make it anew with `cbd cache`."


@dataclass(frozen=True)
class CacheSettings:
    """
    What is kept of the teacher's distribution at each supervised position.

    Args:
        variant (`str`, *optional*, defaults to `"top_k"`): `"top_k"`, the k most likely tokens and the mass of the
            others; or `"sampled"`, tokens drawn from the teacher (arXiv 2503.16870), whose shares are unbiased.
        k (`int`, *optional*, defaults to 64): tokens kept by `"top_k"`.
        n_samples (`int`, *optional*, defaults to 64): draws, with replacement, of `"sampled"`.
        seed (`int`, *optional*, defaults to 0): of the draws.
        temperature (`float`, *optional*, defaults to 1.0): the teacher's; must be that of the loss.
        dtype (`str`, *optional*, defaults to `"float16"`): of the log-probabilities; or `"float32"`, `"bfloat16"`.
        hidden (`str`, *optional*): also keep the last hidden states, in this dtype.
        labels (`bool`, *optional*, defaults to `False`): also keep the log-probability, in `dtype`, of the token that
            follows. A bridge needs it.
        vocab_size (`int`, *optional*): probabilities are over the first tokens only, for a student with fewer padding
            rows than the teacher. By default over all rows of the teacher's head.
        shard_rows (`int`, *optional*, defaults to 1024): rows of the dataset in one file.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    variant: str = "top_k"
    k: int = 64
    n_samples: int = 64
    seed: int = 0
    temperature: float = 1.0
    dtype: str = "float16"
    hidden: str | None = None
    labels: bool = False
    vocab_size: int | None = None
    shard_rows: int = 1024

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} is unknown; choose one of {list(VARIANTS)}.")
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1 token per position.")
        if not 1 <= self.n_samples <= LARGEST_SAMPLE:
            raise ValueError(f"n_samples={self.n_samples} is outside 1 ... {LARGEST_SAMPLE}.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be greater than 0; 1 is the teacher's own.")
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype={self.dtype!r} of the log-probabilities is unknown; choose one of {list(DTYPES)}."
            )
        if self.hidden is not None and self.hidden not in DTYPES:
            raise ValueError(f"hidden={self.hidden!r} is unknown; choose one of {list(DTYPES)}, or leave it out.")
        if self.vocab_size is not None and not self.k <= self.vocab_size and self.variant == "top_k":
            raise ValueError(f"k={self.k} is more than the vocab_size of {self.vocab_size}; lower k.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 1; leave it out for the teacher's.")
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows={self.shard_rows} must be at least 1.")

    @property
    def width(self) -> int:
        """Most tokens that are kept per position."""
        return self.k if self.variant == "top_k" else self.n_samples


@dataclass(frozen=True)
class DataRecord:
    """
    Args:
        name (`str`): of the dataset.
        digest (`str`): of its rows' keys, in order.
        rows (`int`): rows, some of which may be alike and are kept once.
        tokens (`int`): supervised positions in them.
        complete (`bool`): whether all of them are cached.
    """

    name: str
    digest: str
    rows: int
    tokens: int
    complete: bool


@dataclass
class CacheManifest:
    """
    The content of cache.json.

    Args:
        settings ([`CacheSettings`]): what is kept.
        teacher ([`TeacherRecord`]): whose predictions these are.
        tokenizer_digest (`str`): of the vocabulary.
        data (`list[DataRecord]`): datasets, in the order in which they were added.
        shards (`list[ShardRecord]`): files, in the order of their rows.
        packages (`dict[str, str]`): versions of what made it.
    """

    settings: CacheSettings
    teacher: TeacherRecord
    tokenizer_digest: str
    data: list[DataRecord] = field(default_factory=list)
    shards: list[ShardRecord] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows in the files."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Supervised positions in the files."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def command(self) -> str:
        """What makes such a cache: a bridge needs the labels."""
        return "cbd bridge cache" if self.settings.labels else "cbd cache"

    @property
    def vocab_size(self) -> int:
        """How many tokens the probabilities are over."""
        return self.settings.vocab_size or self.teacher.vocab_size

    @property
    def bytes_per_token(self) -> float:
        """Bytes per supervised position."""
        return self.bytes / max(1, self.tokens)

    def differences(self, other: CacheManifest) -> list[str]:
        """What another manifest was made with that this one was not, as `name: this, not that`."""
        mine, others = self._made_with(), other._made_with()
        names = [name for name in mine if name not in others or mine[name] != others[name]]
        return [f"{name}: {mine[name]}, not {others.get(name, 'used')}" for name in names]

    def _made_with(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.settings)
        unused = {"top_k": ("n_samples", "seed"), "sampled": ("k",)}[self.settings.variant]
        kept = {name: value for name, value in settings.items() if name not in unused}
        teacher = {f"teacher {name}": value for name, value in dataclasses.asdict(self.teacher).items()}
        del teacher["teacher name"]  # the same weights may lie elsewhere
        return kept | teacher | {"tokenizer": self.tokenizer_digest}

    def write(self, directory: Path) -> None:
        """Write cache.json in one step."""
        write_manifest(directory / MANIFEST, self, SCHEMA_VERSION)

    @classmethod
    def read(cls, directory: Path) -> CacheManifest:
        """
        Read and check cache.json; the shards are not looked at.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of another version, lacks a field, or names files outside the directory.
        """
        path = directory / MANIFEST
        missing = f"{directory} is not a teacher cache: it has no {MANIFEST}. Give the output_dir of `cbd cache`."
        content = read_manifest(path, SCHEMA_VERSION, missing, _REMEDY)
        lists = {"data": DataRecord, "shards": ShardRecord}
        settings = content.get("settings")
        if isinstance(settings, dict):
            settings = {"labels": False} | settings  # caches from before this setting have none
        manifest = cls(
            settings=read_record(CacheSettings, settings, f"{path}: settings", _REMEDY),
            teacher=read_record(TeacherRecord, content.get("teacher"), f"{path}: teacher", _REMEDY),
            tokenizer_digest=str(content.get("tokenizer_digest")),
            packages=dict(content.get("packages") or {}),
            **{
                name: [
                    read_record(kind, part, f"{path}: {name}[{i}]", _REMEDY)
                    for i, part in enumerate(content.get(name) or [])
                ]
                for name, kind in lists.items()
            },
        )
        check_names(manifest.shards, str(path), "cache")
        return manifest

    def check_shards(self, directory: Path, verify: str = "size") -> None:
        """
        Check that every shard is there and whole.

        Args:
            directory (`Path`): the cache's.
            verify (`str`, *optional*, defaults to `"size"`): `"size"`, `"full"` (sha256 of every file) or `"none"`.

        Raises:
            ValueError: a shard is missing or broken, or `verify` is unknown.
        """
        check_files(directory, self.shards, verify, _REMEDY)


__all__ = [
    "DTYPES",
    "LARGEST_SAMPLE",
    "MANIFEST",
    "SCHEMA_VERSION",
    "VARIANTS",
    "CacheManifest",
    "CacheSettings",
    "DataRecord",
]
