"""Lazy reading of safetensors checkpoints, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from cbd_hf.checkpoint import INDEX_FILE, SINGLE_FILE, CheckpointError, CheckpointReader, weight_files

from .models import random_model, tiny_config


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    random_model(tiny_config("llama")).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_every_parameter_is_read(family: str, max_shard_size: str, tmp_path: Path) -> None:
    model = random_model(tiny_config(family))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(weight_files(tmp_path)) > 1) == (max_shard_size == "40KB")
    with CheckpointReader(tmp_path) as reader:
        for name, parameter in model.named_parameters():
            assert name in reader
            assert reader.shape(name) == tuple(parameter.shape)
            assert reader.dtype(name) == torch.float32
            assert torch.equal(reader.read(name), parameter)


def test_backbone_alone(tmp_path: Path) -> None:
    """The Hub's `gpt2` lacks the model's prefix."""
    model = random_model(tiny_config("gpt2"))
    model.transformer.save_pretrained(tmp_path)
    with CheckpointReader(tmp_path, model.base_model_prefix) as reader:
        for name, parameter in model.named_parameters():
            assert torch.equal(reader.read(name), parameter)
    with CheckpointReader(tmp_path) as reader:
        assert "transformer.wte.weight" not in reader and "wte.weight" in reader


def test_full_names_win_over_bare_ones(tmp_path: Path) -> None:
    save_file({"model.a": torch.zeros(1), "a": torch.ones(1)}, tmp_path / SINGLE_FILE)
    with CheckpointReader(tmp_path, "model") as reader:
        assert reader.read("model.a") == 0
        assert reader.read("a") == 1


def test_single_file_wins_over_an_index(sharded: Path) -> None:
    save_file({"a": torch.ones(1)}, sharded / SINGLE_FILE)
    assert weight_files(sharded) == [sharded / SINGLE_FILE]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.tensor([0.5, 2.0], dtype=dtype)}, tmp_path / SINGLE_FILE)
    with CheckpointReader(tmp_path) as reader:
        assert reader.dtype("a") == dtype
        assert reader.read("a").dtype == dtype
        assert reader.read("a").tolist() == [0.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).to(dtype)}, tmp_path / SINGLE_FILE)
    with CheckpointReader(tmp_path) as reader, pytest.raises(CheckpointError, match="Tensor a in .* has dtype"):
        reader.dtype("a")


def test_missing_tensor(sharded: Path) -> None:
    with CheckpointReader(sharded) as reader:
        assert "nothing" not in reader
        for ask in (reader.read, reader.shape, reader.dtype):
            with pytest.raises(CheckpointError, match=f"{sharded} has no tensor nothing"):
                ask("nothing")


def test_missing_shard(sharded: Path) -> None:
    shard = weight_files(sharded)[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"lacks the weight file.*{shard.name}"):
        weight_files(sharded)


@pytest.mark.parametrize("keep", ["all but a byte", "half the header", "nothing"])
def test_truncated_file(keep: str, tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({"a": torch.ones(100)}, path)
    os.truncate(path, {"all but a byte": path.stat().st_size - 1, "half the header": 20, "nothing": 0}[keep])
    with pytest.raises(CheckpointError, match=f"{path} is truncated or not a safetensors file"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_unread(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match=rf"only pickled weights \({name}\)"):
        CheckpointReader(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_naming_a_file_outside(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "elsewhere.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        CheckpointReader(directory)


@pytest.mark.parametrize(
    "index", [b"{", b"[1]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {}}', b"\xff"]
)
def test_invalid_index(index: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_bytes(index)
    with pytest.raises(CheckpointError, match="is not a valid safetensors index"):
        weight_files(tmp_path)


def test_closed_after_use(sharded: Path) -> None:
    reader: Any
    with CheckpointReader(sharded) as reader:
        assert "model.norm.weight" in reader
    assert "model.norm.weight" not in reader


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are opened."""
    paths: list[Path] = []
    real = safetensors.safe_open

    def record(path: Path, *args: Any, **kwargs: Any) -> Any:
        paths.append(path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", record)
    return paths


def test_headers_are_read_once(sharded: Path, opened: list[Path]) -> None:
    with CheckpointReader(sharded) as reader:
        assert opened == weight_files(sharded)
        for name in ("model.norm.weight", "model.embed_tokens.weight"):
            assert reader.shape(name) and reader.dtype(name) and reader.num_bytes(name) and name in reader
        assert opened == weight_files(sharded)
        reader.read("model.norm.weight")
        assert len(opened) == len(weight_files(sharded)) + 1


@pytest.mark.parametrize("start", [None, 0, 1, -2, 4, 9])
@pytest.mark.parametrize("stop", [None, 0, 3, -1, 5, 9])
def test_rows(start: int | None, stop: int | None, tmp_path: Path) -> None:
    stored = torch.arange(15.0).reshape(5, 3)
    save_file({"a": stored, "vector": stored[:, 0].clone()}, tmp_path / SINGLE_FILE)
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(reader.read("a", start, stop), stored[start:stop])
        assert torch.equal(reader.read("vector", start, stop), stored[start:stop, 0])


def test_scalars_have_no_rows(tmp_path: Path) -> None:
    save_file({"a": torch.tensor(3.0)}, tmp_path / SINGLE_FILE)
    with CheckpointReader(tmp_path) as reader:
        assert reader.read("a") == 3 and reader.shape("a") == ()
        with pytest.raises(ValueError, match="Tensor a in .* is a scalar"):
            reader.read("a", 0, 1)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2), (torch.int8, 1), (torch.bool, 1)]
    + [(torch.float8_e4m3fn, 1), (torch.float8_e8m0fnu, 1), (torch.complex64, 8), (torch.uint16, 2)],
)
def test_num_bytes(dtype: torch.dtype, size: int, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3).to(dtype), "empty": torch.zeros(0, 3).to(dtype)}, tmp_path / SINGLE_FILE)
    with CheckpointReader(tmp_path) as reader:
        assert reader.num_bytes("a") == 6 * size
        assert reader.num_bytes("empty") == 0
