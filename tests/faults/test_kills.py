"""A build that is killed again and again ends with the very weights of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cbd_hf import DistillationChain

from ..models import random_model, tiny_config, tiny_tokenizer, words
from .kill_worker import AIMED


ROOT = Path(__file__).parents[2]
KILLS = 20  # at random moments, besides the aimed ones


def content(chain: Path) -> dict[str, Any]:
    """Hashes of all files of all anchors, and what their stages recorded, without times."""
    loaded = DistillationChain.from_pretrained(chain, verify="full")
    return {
        anchor.name: (
            {name: entry["sha256"] for name, entry in anchor.files.items()},
            {name: value for name, value in (anchor.stage or {}).items() if name != "seconds"},
        )
        for anchor in loaded
    }


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    # GPT-2, because it has dropout, whose random numbers must continue where they were.
    random_model(tiny_config("gpt2", layers=4), std=0.1).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    rng = random.Random(0)
    rows = [{"prompt": words(rng, rng.randint(2, 6)), "completion": " " + words(rng, 6)} for _ in range(23)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "source": str(tmp_path / "source"),
        "dataset": str(tmp_path / "rows.jsonl"),
        "data_format": "columns",
        "eval_documents": 3,
        "calibration_documents": 2,
        "supervised": {"max_steps": 3, "save_steps": 1},
        "anchors": [
            {"name": "mid", "num_hidden_layers": 3, "supervised": None},
            {"name": "small", "num_hidden_layers": 2, "supervised": None},
        ],
        # Five steps an epoch: the end lies within one.
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "lmbda": 0.4,
        "max_new_tokens": 4,
        "disable_dropout": False,
        "save_steps": 1,
        "save_total_limit": 1,
        "max_length": 32,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "kills": KILLS,
        "kill_seed": 0,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill_worker", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    print(done.stderr)  # every kill, if the test fails
    result = json.loads((tmp_path / "result.json").read_text())
    assert sum("aim" not in kill["plan"] for kill in result["kills"]) >= KILLS
    assert len(result["kills"]) >= KILLS + len(AIMED)
    expected = content(tmp_path / "whole" / "chain")
    assert expected["mid"][1]["steps"] == 7
    for run in range(result["runs"]):
        directory = tmp_path / f"killed-{run}"
        assert content(directory / "chain") == expected, [kill for kill in result["kills"] if kill["run"] == run]
        assert [path.name for path in directory.iterdir()] == ["chain"]  # nothing is left of what was killed
        assert sorted(path.name for path in (directory / "chain").rglob(".*")) == []
