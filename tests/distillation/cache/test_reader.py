"""Rows are found in any order; what does not suit a training is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets

from cbd_hf.distillation.cache import TeacherCache

from ...models import answers_dataset, tiny_tokenizer
from .helpers import build, save_teacher
from .test_round_trip import prepared


@pytest.fixture
def copied(cached: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cached, tmp_path / "copied"))


def change(directory: Path, **changes: Any) -> None:
    content = json.loads((directory / "cache.json").read_text())
    (directory / "cache.json").write_text(json.dumps(content | changes))


def test_locate(cached: Path, tmp_path: Path) -> None:
    cache, rows = TeacherCache.from_pretrained(cached), prepared(tmp_path)
    assert cache.locate(rows) == list(range(20))
    order = [3, 3, 17, 0, 9]
    assert cache.locate(rows.select(order)) == order
    shuffled = rows.add_column("number", list(range(20))).shuffle(seed=3)
    assert cache.locate(shuffled) == shuffled["number"]
    assert cache.locate(iter([rows[4], rows[2]])) == [4, 2]
    assert cache.locate([]) == []


def test_missing_rows(cached: Path, tmp_path: Path) -> None:
    cache, rows = TeacherCache.from_pretrained(cached), prepared(tmp_path)
    others = prepared(tmp_path, answers_dataset(6, seed=1))
    with pytest.raises(ValueError, match=r"6 of 9 rows .*\(first: 3, 4, 5, 6, 7\).*20 rows of dataset.*--append"):
        cache.locate(concatenate_datasets([rows.select([0, 1, 2]), others]))
    whole = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    with pytest.raises(ValueError, match="completion_only_loss"):
        cache.locate(whole)


def test_check(cached: Path, teacher: Path, tmp_path: Path) -> None:
    cache = TeacherCache.from_pretrained(cached)
    cache.check(tokenizer=tiny_tokenizer(), temperature=1.0, objective="reverse_kl", teacher=teacher)
    cache.check()
    other = tiny_tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(ValueError, match="another vocabulary"):
        cache.check(tokenizer=other)
    with pytest.raises(ValueError, match="temperature=2.0 of the loss is not that"):
        cache.check(temperature=2.0)
    with pytest.raises(ValueError, match="no hidden states"):
        cache.check(hidden=True)
    with pytest.raises(ValueError, match="are not those of the teacher cache"):
        cache.check(teacher=save_teacher(tmp_path / "other", seed=5))


def test_sampled_needs_the_forward_divergence(teacher: Path, tmp_path: Path) -> None:
    build(teacher, tmp_path / "cache", Dataset.from_list([{"text": "w1 w2 w3"}]), variant="sampled")
    cache = TeacherCache.from_pretrained(tmp_path / "cache")
    cache.check(objective="forward_kl")
    with pytest.raises(ValueError, match="only 'forward_kl' is linear"):
        cache.check(objective="reverse_kl")


def test_broken_shards(copied: Path) -> None:
    shard = copied / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    TeacherCache.from_pretrained(copied)
    with pytest.raises(ValueError, match="shard-00001.*sha256"):
        TeacherCache.from_pretrained(copied, verify="full")
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="bytes instead of"):
        TeacherCache.from_pretrained(copied)
    with pytest.raises(ValueError, match="shard-00001.*cannot be read"):
        TeacherCache.from_pretrained(copied, verify="none").batch([8])
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001.*is missing"):
        TeacherCache.from_pretrained(copied)
    with pytest.raises(ValueError, match="verify='all' is unknown"):
        TeacherCache.from_pretrained(copied, verify="all")


def test_refused_manifests(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a teacher cache"):
        TeacherCache.from_pretrained(tmp_path / "nothing")
    content = json.loads((copied / "cache.json").read_text())
    settings, shards = content["settings"], content["shards"]
    for changes, message in (
        ({"schema_version": 2}, "schema_version 2.*Upgrade"),
        ({"schema_version": None}, "schema_version None.*make it anew"),
        ({"settings": settings | {"variant": "best"}}, "variant='best' is unknown"),
        ({"settings": settings | {"k": "5"}}, "k is '5', but must be a int"),
        ({"settings": {"k": 5}}, "missing or unknown"),
        ({"settings": settings | {"mode": 1}}, "mode are missing or unknown"),
        ({"teacher": []}, "must be a JSON object"),
        ({"shards": [shards[0] | {"file": "../shard.safetensors"}]}, "leaves the cache"),
        ({"shards": [shards[0] | {"rows": -1}]}, "cannot be negative"),
    ):
        change(copied, **{"settings": settings, "shards": shards, "schema_version": 1} | changes)
        with pytest.raises(ValueError, match=message):
            TeacherCache.from_pretrained(copied)
        change(copied, teacher=content["teacher"])
    (copied / "cache.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        TeacherCache.from_pretrained(copied)
