"""`cbd inspect`: a chain as a table, as JSON, and its verification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import MambaConfig

from cbd_hf.chain import DistillationChain
from cbd_hf.checkpoint import CheckpointError
from cbd_hf.cli import main as cbd
from cbd_hf.commands.inspect import describe_chain, main
from tests.models import random_model


def test_table(tiny_chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tiny_chain)])
    title, header, _, *rows = capsys.readouterr().out.splitlines()
    assert "2 llama anchors" in title and "basis as-is" in title
    assert {"name", "n_params", "layers", "hidden_size", "bits_per_byte"} <= set(header.split())
    large, small = DistillationChain.from_pretrained(tiny_chain)
    assert rows[0].split()[:2] == ["large", f"{large.n_params:,}"]
    assert rows[1].split()[:2] == ["small", f"{small.n_params:,}"]


def test_json(tiny_chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tiny_chain), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["layers"], row["hidden_size"]) for row in rows] == [("large", 4, 32), ("small", 2, 16)]
    assert rows[0]["teacher"] is None and rows[0]["bits_per_byte"] is None


def test_verify(tiny_chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tiny_chain), "--verify"])
    assert "match their sha256" in capsys.readouterr().out
    copy = Path(shutil.copytree(tiny_chain, tmp_path / "chain"))
    weights = copy / "anchors" / "1-small" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)  # the same size: only the hash tells
    main([str(copy)])
    with pytest.raises(CheckpointError, match="1-small"):
        main([str(copy), "--verify"])
    capsys.readouterr()
    assert cbd(["inspect", str(copy), "--verify"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cbd: error:") and str(weights) in error and "Traceback" not in error
    weights.write_bytes(content[:-1])
    assert cbd(["inspect", str(copy)]) == 2
    assert str(weights) in capsys.readouterr().err


def test_not_a_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cbd(["inspect", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
    assert cbd(["inspect", str(tmp_path)]) == 2
    assert "chain.json" in capsys.readouterr().err


def test_a_family_without_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = [
        MambaConfig(
            num_hidden_layers=layers, hidden_size=16, state_size=4, vocab_size=32, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
        for layers in (3, 2)
    ]  # fmt: skip
    chain = DistillationChain.from_anchors([random_model(config) for config in configs], tmp_path / "chain")
    rows = json.loads(json.dumps(describe_chain(chain)))
    assert [(row["layers"], row["hidden_size"], row["heads"]) for row in rows] == [(3, 16, None), (2, 16, None)]
    main([str(chain.path)])
    assert "2 mamba anchors" in capsys.readouterr().out
    assert "| 3 | 16 | – |" in (chain.path / "README.md").read_text()
