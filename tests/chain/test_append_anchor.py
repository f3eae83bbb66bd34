from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import cbd_hf.chain as chain_module
from cbd_hf.chain import DistillationChain, append_anchor
from tests.chain.helpers import (
    make_model,
    make_tokenizer,
    snapshot,
)
from tests.models import VOCAB


def test_append_anchor(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "chain"
    chain = append_anchor(root, checkpoints["large"], name="large", basis="shared", metadata={"license": "mit"})
    assert len(chain) == 1
    alone = DistillationChain.from_pretrained(root, verify="full")
    assert alone.adjacent(alone.sizes[0]) == (alone[0], alone[0])
    with pytest.raises(ValueError, match="outside"):
        alone.adjacent(alone.sizes[0] - 1)
    append_anchor(root, checkpoints["medium"], name="medium", stage={"steps": 3}, basis="shared")
    cut = {"from": "medium", "layers": [1], "removed": [0]}
    append_anchor(root, checkpoints["small"], name="small", cut=cut, metadata={"note": "x"})
    chain = DistillationChain.from_pretrained(root, verify="full")
    assert [anchor.name for anchor in chain] == ["large", "medium", "small"]
    assert (chain["medium"].stage, chain["small"].cut) == ({"steps": 3}, cut)
    assert (chain.basis, chain.metadata) == ("shared", {"license": "mit", "note": "x"})
    assert "small" in (root / "README.md").read_text()
    assert sorted(path.name for path in (root / "anchors").iterdir()) == ["0-large", "1-medium", "2-small"]
    assert checkpoints["small"].is_dir()


def test_append_checks(checkpoints: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    root = tmp_path / "chain"
    append_anchor(root, checkpoints["medium"], name="medium")
    before = snapshot(root)
    make_model(1, "llama").save_pretrained(tmp_path / "llama")
    make_model(1).save_pretrained(tmp_path / "bare")
    make_model(1).save_pretrained(tmp_path / "odd")
    make_tokenizer(VOCAB - 1).save_pretrained(tmp_path / "odd")
    for source, options, message in [
        (checkpoints["large"], {"name": "large"}, "must be smaller than the chain's last one, 'medium'"),
        (checkpoints["medium"], {"name": "again"}, "must be smaller"),
        (checkpoints["small"], {"name": "Medium"}, "already has an anchor named"),
        (checkpoints["small"], {"name": "small", "basis": "shared"}, "basis 'shared' differs"),
        (checkpoints["small"], {"name": "small", "cut": {"from": "x", "layers": [0]}}, "from='x'"),
        (checkpoints["small"], {"name": "small", "stage": {"x": object()}}, "stage"),
        (tmp_path / "llama", {"name": "llama"}, "different architecture"),
        (tmp_path / "odd", {"name": "odd"}, "another tokenizer vocabulary"),
        (tmp_path / "bare", {"name": "bare", "tokenizer": make_tokenizer(VOCAB - 1)}, "another tokenizer vocabulary"),
        (root / "anchors" / "0-medium", {"name": "inside"}, "lies in the chain's own anchors"),
    ]:
        with pytest.raises(ValueError, match=message):
            append_anchor(root, source, **options)
        assert snapshot(root) == before
    with pytest.raises(FileNotFoundError, match="does not exist"):
        append_anchor(root, tmp_path / "nowhere", name="x")
    chain = append_anchor(root, tmp_path / "bare", name="bare", tokenizer=tokenizer)
    assert chain["bare"].load_tokenizer() is not None


KILLED = """
import os, sys
import cbd_hf.chain as module
module.commit_directory = lambda *args: os._exit(9)
module.append_anchor(sys.argv[1], sys.argv[2], name="medium")
"""


@pytest.mark.parametrize("point", ["commit_directory", "atomic_write_text", "write_manifest", "written"])
def test_append_survives_a_kill(
    checkpoints: dict[str, Path], tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "chain"
    append_anchor(root, checkpoints["large"], name="large")
    if point == "commit_directory":
        command = [sys.executable, "-c", KILLED, str(root), str(checkpoints["medium"])]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 9
    else:
        # Nothing is left to clean up at these points, so that an exception leaves what a kill leaves.
        write = chain_module.write_manifest

        def stop(*args: Any) -> None:
            if point == "written":
                write(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(chain_module, "write_manifest" if point == "written" else point, stop)
            append_anchor(root, checkpoints["medium"], name="medium")
    # chain.json is the commit point: before it the chain is the old one, after it the new one.
    committed = point == "written"
    chain = DistillationChain.from_pretrained(root, verify="full")
    assert [anchor.name for anchor in chain] == (["large", "medium"] if committed else ["large"])
    assert len(list((root / "anchors").iterdir())) == 2
    (root / "anchors" / "mine").mkdir()
    append_anchor(root, checkpoints["small"], name="small")
    chain = DistillationChain.from_pretrained(root, verify="full")
    assert len(chain) == (3 if committed else 2)
    assert {path.name for path in (root / "anchors").iterdir()} == {*(a.path.name for a in chain), "mine"}
    assert chain[-1].name in (root / "README.md").read_text()


def test_append_cleans_a_killed_first_call(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "chain"
    for name in ("0-old", ".0-old.tmp-123"):
        (root / "anchors" / name).mkdir(parents=True)
        (root / "anchors" / name / "model.safetensors").write_text("half")
    (root / ".chain.json.tmp-123").write_text("{")
    (root / "training").mkdir()
    append_anchor(root, checkpoints["large"], name="large")
    assert [path.name for path in (root / "anchors").iterdir()] == ["0-large"]
    assert {path.name for path in root.iterdir()} == {"anchors", "chain.json", "README.md", "training"}
    # Several finished anchors are not the leftovers of one killed call.
    append_anchor(root, checkpoints["small"], name="small")
    (root / "chain.json").unlink()
    with pytest.raises(ValueError, match="has no chain.json, but.*1-small"):
        append_anchor(root, checkpoints["large"], name="large")
    assert {path.name for path in (root / "anchors").iterdir()} == {"0-large", "1-small"}
