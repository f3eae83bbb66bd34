from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cbd_hf.chain import DistillationChain
from cbd_hf.checkpoint import CheckpointError
from tests.chain.helpers import (
    snapshot,
)


def test_push_to_hub(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class FakeApi:
        def __init__(self, **kwargs: Any) -> None:
            calls.append(("init", (), kwargs))

        def __getattr__(self, name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append((name, args, kwargs))
                return SimpleNamespace(repo_id="me/chain") if name == "create_repo" else f"https://hub/{name}"

            return call

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    (copied / "anchors" / "9-orphan").mkdir()
    chain = DistillationChain.from_pretrained(copied)
    assert chain.push_to_hub("chain", private=True, token="t", revision="v1") == "https://hub/upload_folder"
    assert [name for name, _, _ in calls] == ["init", "create_repo", "create_branch", "upload_folder"]
    assert calls[0][2] == {"token": "t"}
    assert calls[1][1:] == (("chain",), {"private": True, "exist_ok": True})
    assert calls[2][1:] == (("me/chain",), {"branch": "v1", "exist_ok": True})
    upload = calls[3][2]
    assert (upload["repo_id"], upload["revision"], upload["folder_path"]) == ("me/chain", "v1", copied)
    assert set(upload["allow_patterns"]) == set(snapshot(copied))

    calls.clear()
    chain.push_to_hub("chain")
    assert [name for name, _, _ in calls] == ["init", "create_repo", "upload_folder"]

    calls.clear()
    weights = copied / "anchors" / "0-large" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="0-large"):
        chain.push_to_hub("chain")
    assert calls == []


def test_chain_from_hub(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def download(repo_id: str, **kwargs: Any) -> str:
        calls.append((repo_id, kwargs))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    chain = DistillationChain.from_pretrained("me/my-chain", revision="v1", token="t", cache_dir=tmp_path)
    assert len(chain) == 3
    ((repo_id, kwargs),) = calls
    assert repo_id == "me/my-chain"
    assert (kwargs["revision"], kwargs["token"], kwargs["cache_dir"]) == ("v1", "t", str(tmp_path))
    assert "*.bin" in kwargs["ignore_patterns"] and "chain.json" in kwargs["allow_patterns"]


def test_anchors_from_hub(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patterns = []

    def download(repo_id: str, **kwargs: Any) -> str:
        patterns.append((kwargs["allow_patterns"], kwargs["ignore_patterns"]))
        return str(checkpoints[repo_id.split("/")[1]])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    chain = DistillationChain.from_anchors(["org/small", "org/large"], tmp_path / "chain")
    assert [anchor.name for anchor in chain] == ["large", "small"]
    from huggingface_hub.utils import filter_repo_objects

    names = [*snapshot(checkpoints["large"]), "model-00001-of-00002.safetensors", "LICENSE"]
    others = ["pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors", "tf_model.h5", "modeling.py"]
    allow, ignore = patterns[0]
    assert list(filter_repo_objects(names + others, allow_patterns=allow, ignore_patterns=ignore)) == names


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "pytorch_model.bin"], r"'org/old' holds only pickled weights \(pytorch_model.bin\)"),
        (["config.json"], "'org/old' holds no safetensors"),
        (None, "'org/old' holds no safetensors"),
    ],
)
def test_hub_repository_without_safetensors(
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    files: list[str] | None,
    message: str,
) -> None:
    class FakeApi:
        def __init__(self, **kwargs: Any) -> None: ...

        def list_repo_files(self, repo_id: str, revision: str | None) -> list[str]:
            if files is None:
                raise OSError("offline")
            return files

    (tmp_path / "hub").mkdir()
    shutil.copy(checkpoints["large"] / "config.json", tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    with pytest.raises(CheckpointError, match=message):
        DistillationChain.from_anchors(["org/old", checkpoints["small"]], tmp_path / "chain")
