from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cbd_hf.chain import AdjacentPair, DistillationChain
from cbd_hf.checkpoint import CheckpointError
from tests.chain.helpers import (
    edit_anchor,
    edit_manifest,
    make_model,
)


def test_missing_chain(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="it has no chain.json.*from_anchors"):
        DistillationChain.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="not an existing local directory"):
        DistillationChain.from_pretrained("./nowhere")
    with pytest.raises(ValueError, match="verify must be"):
        DistillationChain.from_pretrained(tmp_path, verify="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["{", "[1]", "\ufeff{}"])
def test_invalid_json(copied: Path, text: str) -> None:
    (copied / "chain.json").write_text(text)
    with pytest.raises(ValueError, match="chain.json (is not valid JSON|must hold a JSON object)"):
        DistillationChain.from_pretrained(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2, "anchors": ...}, "schema_version 2.*Upgrade"),
        ({"schema_version": 0}, "schema_version 0"),
        ({"schema_version": "1"}, "schema_version is '1', but must be a int"),
        ({"schema_version": True}, "schema_version is True"),
        ({"family": ..., "basis": ...}, "lacks the field.s. family, basis"),
        ({"family": {"model_type": "gpt2"}}, "family lacks the field.s. vocab_size"),
        ({"anchors": []}, "lists no anchors"),
        ({"anchors": [3]}, r"anchors\[0\] must be a JSON object"),
        ({"anchors": [{"name": "a"}]}, r"anchors\[0\] lacks the field.s. directory"),
    ],
)
def test_invalid_manifest(copied: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(copied, **changes)
    with pytest.raises(ValueError, match=message):
        DistillationChain.from_pretrained(copied, verify=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_params": 0}, "must be positive"),
        ({"n_params": 10**9}, "largest to the smallest"),
        ({"n_params": 1.5}, "n_params is 1.5"),
        ({"name": "large"}, "same name"),
        ({"stage": "none"}, "must be a dict or null"),
        ({"files": {}}, "must list config.json"),
        ({"files": {"config.json": {"size": 1}}}, "lacks the field.s. sha256"),
        ({"directory": "../elsewhere"}, "leaves the chain"),
        ({"directory": "/etc"}, "leaves the chain"),
        ({"files": {"../../secret": {"size": 1, "sha256": ""}}}, "leaves the anchor's directory"),
        ({"files": {"C:\\secret": {"size": 1, "sha256": ""}}}, "leaves the anchor's directory"),
    ],
)
def test_invalid_anchor(copied: Path, changes: dict[str, Any], message: str) -> None:
    edit_anchor(copied, 1, **changes)
    with pytest.raises(ValueError, match=message):
        DistillationChain.from_pretrained(copied, verify=None)


def test_truncated_and_missing_files_are_named(copied: Path) -> None:
    weights = copied / "anchors" / "1-medium" / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size - 1)
    (copied / "anchors" / "2-small" / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        DistillationChain.from_pretrained(copied)
    assert f"{weights} has {size - 1:,} bytes instead of {size:,}" in str(caught.value)
    assert f"{copied / 'anchors' / '2-small' / 'config.json'} is missing" in str(caught.value)
    chain = DistillationChain.from_pretrained(copied, verify=None)
    assert len(chain.check_files()) == 2
    with pytest.raises(CheckpointError, match="bytes instead of"):
        chain.save_pretrained(copied.parent / "copy")
    assert [path.name for path in copied.parent.iterdir()] == ["chain"]


def test_missing_shard(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    make_model(3).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    chain = DistillationChain.from_anchors([tmp_path / "sharded", checkpoints["small"]], tmp_path / "chain")
    shard = next(iter(sorted(chain[0].path.glob("*.safetensors"))))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        DistillationChain.from_pretrained(tmp_path / "chain")


def test_changed_bytes_are_found_by_hash_only(copied: Path) -> None:
    weights = copied / "anchors" / "0-large" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    chain = DistillationChain.from_pretrained(copied)
    assert chain.check_files() == []
    chain.verify(full=False)
    (problem,) = chain.check_files(full=True)
    assert str(weights) in problem and "sha256" in problem
    with pytest.raises(CheckpointError, match="0-large"):
        chain.verify()
    with pytest.raises(CheckpointError, match="0-large"):
        DistillationChain.from_pretrained(copied, verify="full")


def test_wrong_parameter_count_is_found(copied: Path) -> None:
    chain = DistillationChain.from_pretrained(copied)
    edit_anchor(copied, 1, n_params=chain.sizes[1] + 1)
    with pytest.raises(CheckpointError, match="describes .* parameters instead of"):
        DistillationChain.from_pretrained(copied, verify="full")


def test_adjacent(saved: Path) -> None:
    chain = DistillationChain.from_pretrained(saved)
    large, medium, small = chain.sizes
    assert chain.adjacent(small + 1) == AdjacentPair(chain["small"], chain["medium"])
    assert chain.adjacent(medium + 0.5) == (chain["medium"], chain["large"])
    assert chain.adjacent(large - 1).large is chain["large"]
    for anchor in chain:
        assert chain.adjacent(anchor.n_params) == (anchor, anchor)
        assert chain.adjacent(float(anchor.n_params)) == (anchor, anchor)


@pytest.mark.parametrize("n_params", [1, 1e12, 0, -5, float("nan"), float("inf"), True, "138M", None])
def test_adjacent_outside(saved: Path, n_params: Any) -> None:
    with pytest.raises(ValueError) as caught:
        DistillationChain.from_pretrained(saved).adjacent(n_params)
    if isinstance(n_params, float | int) and n_params in (1, 1e12, 0, -5) and n_params is not True:
        chain = DistillationChain.from_pretrained(saved)
        assert f"{chain.sizes[0]:,}" in str(caught.value) and f"{chain.sizes[-1]:,}" in str(caught.value)
