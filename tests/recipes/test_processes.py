"""Recipes with a user's mistake, and on more processes than they need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ..distributed.launching import launch
from ..test_clients import SENTENCES, make_target, write_lines


@pytest.mark.distributed
def test_one_process_evaluates(tmp_path: Path) -> None:
    make_target(tmp_path / "model")
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in SENTENCES])
    options = [f"--model_name_or_path={tmp_path / 'model'}", f"--texts={tmp_path / 'texts.jsonl'}"]
    launch("cpu_2proc", "recipes/evaluate.py", *options, f"--output_file={tmp_path / 'scores.json'}")
    assert json.loads((tmp_path / "scores.json").read_text())["language_modeling"]["tokens"] > 0


@pytest.mark.distributed
def test_two_processes_say_it_once(tmp_path: Path) -> None:
    (tmp_path / "answers.yaml").write_text(yaml.safe_dump({"source": "a", "dataset": "b", "top_q": 1}))
    options = [f"--config={tmp_path / 'answers.yaml'}", f"--output_dir={tmp_path / 'answers'}"]
    with pytest.raises(RuntimeError) as stopped:
        launch("cpu_2proc", "recipes/bridge.py", "generate", *options)
    before, _, after = str(stopped.value).partition("cbd: error: Unknown arguments from config file: ['--top_q', '1']")
    assert after and "cbd: error" not in after
    assert "Traceback" not in before  # the launcher's own is below
