"""The quickstart end to end on a tiny random source: the report's schema, its figure, its refusal to overwrite."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cbd_hf.commands import quickstart
from cbd_hf.distillation.recipe import BuildArguments, check_recipe

from ..models import random_model, tiny_config, tiny_tokenizer, words


@pytest.mark.slow
def test_quickstart_reports_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text, output = tmp_path / "source", tmp_path / "text.jsonl", tmp_path / "run"
    random_model(tiny_config("llama", layers=6), std=0.1).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    rng = random.Random(0)
    text.write_text("\n".join(json.dumps({"text": words(rng, 30)}) for _ in range(80)))
    command = [
        f"--source={source}",
        f"--text={text}",
        f"--output_dir={output}",
        "--eval_documents=4",
        "--eval_max_length=32",
        "--recovery_steps=1",
        "--prompt=w1 w2",
        "--max_steps=2",
        "--per_device_train_batch_size=2",
        "--max_length=32",
        "--packing=True",
        "--packing_strategy=wrapped",
        "--gradient_checkpointing=False",
    ]
    quickstart.main(command)
    report = json.loads((output / "report.json").read_text())
    assert set(report) >= {"source", "wall_seconds", "peak_rss_gib", "chain", "targets"}
    assert [anchor["layers"] for anchor in report["chain"]["anchors"]] == [5, 4]
    assert set(report["chain"]["anchors"][0]) >= {"n_params", "hidden_size", "bits_per_byte", "bits_per_byte_before"}
    assert len(report["targets"]) == 3
    for target in report["targets"]:
        large, small = (anchor["n_params"] for anchor in report["chain"]["anchors"])
        assert small <= target["n_params"] <= large  # so few layers leave no shape strictly between for each size
        assert 0 <= target["alpha"] <= 1 and target["init_seconds"] > 0 and target["sample"]
        for phase in ("step0", "recovered"):
            assert set(target["bits_per_byte"][phase]) == {"cbd", "random", "expand", "cut"}
    assert (output / "report.png").stat().st_size > 10_000
    assert "| A1 |" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="already holds a report"):
        quickstart.main(command)


def test_several_processes_are_refused(tmp_path: Path) -> None:
    training: Any = SimpleNamespace(world_size=2, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="one process, not in 2.*--num_processes 1"):
        quickstart.run(quickstart.QuickstartArguments(), training)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_default_anchors_are_a_valid_recipe(family: str, tmp_path: Path) -> None:
    from cbd_hf import StepwiseDistillationConfig
    from cbd_hf.distillation.cutting import cut_config

    config = tiny_config(family, layers=12, heads=8)
    anchors = quickstart.default_anchors(config, max_steps=10)
    check_recipe(
        BuildArguments(source="x", dataset="x", anchors=anchors),
        StepwiseDistillationConfig(output_dir=str(tmp_path), report_to="none"),
    )
    for anchor in anchors:
        config = cut_config(
            config, {name: value for name, value in anchor.items() if name not in ("name", "training")}
        )
    assert config.num_hidden_layers == 10 and config.hidden_size < 64
