"""The example runs as its text says, on tiny models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from .helpers import source_model, source_tokenizer, student_model, student_tokenizer


EXAMPLE = Path(__file__).parents[3] / "examples" / "bridge_two_tokenizers.py"


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="the examples are not here")
def test_two_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, model, tokenizer in (
        ("source", source_model(), source_tokenizer()),
        ("student", student_model(), student_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("source", "student", "bridge")]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *paths, "--max_steps", "5"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "span 0 student" in printed and "span 0 source" in printed and "'divergence'" in printed
    anchor = tmp_path / "bridge" / "anchor"
    saved = AutoModelForCausalLM.from_pretrained(anchor)
    assert [*saved.state_dict()] == [*student_model().state_dict()]
    assert AutoTokenizer.from_pretrained(anchor).get_vocab() == student_tokenizer().get_vocab()
    assert not any("trainer" in path.name or "checkpoint" in path.name for path in anchor.iterdir())
