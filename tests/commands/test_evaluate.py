"""`cbd eval`: one call, a table and a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cbd_hf.commands.evaluate import EvaluateArguments, main, run
from cbd_hf.data.instructions import load_instructions, split_instructions

from ..test_clients import SENTENCES, make_target, write_lines


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluate")
    make_target(directory / "model")
    (directory / "prose.txt").write_text("\n\n".join(SENTENCES), encoding="utf-8")
    rows = [{"instruction": f"Say {i}.", "context": "", "response": text} for i, text in enumerate(SENTENCES)]
    write_lines(directory / "dolly.jsonl", rows)
    return directory


def test_both_evaluations(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results" / "scores.json"
    command = ["--model_name_or_path", str(files / "model"), "--texts", str(files / "prose.txt")]
    command += ["--valid_documents", "2", "--dataset", str(files / "dolly.jsonl"), "--eval_size", "2"]
    command += ["--seeds", "10", "20", "--max_new_tokens", "4", "--output_file", str(output)]
    main(command)
    results = json.loads(output.read_text())
    assert results["language_modeling"]["documents"] == 2
    assert set(results["rouge_l"]["per_seed"]) == {"10", "20"} and results["rouge_l"]["examples"] == 2
    _, held_out = split_instructions(load_instructions(files / "dolly.jsonl"), 2, 0)
    assert [sample["prompt"] for sample in results["rouge_l"]["samples"]] == held_out["prompt"][:]
    printed = capsys.readouterr().out
    assert "bits per byte" in printed and "Rouge-L" in printed
    with pytest.raises(FileExistsError, match="choose another output_file"):
        main(command)


def test_config_file_and_override(files: Path, tmp_path: Path) -> None:
    values = {"model_name_or_path": "absent", "texts": str(files / "prose.txt"), "max_length": 1}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    override = ["--model_name_or_path", str(files / "model"), "--max_length", "8"]
    main(["--config", str(config), *override])
    config.write_text(yaml.safe_dump(values | {"max_lenght": 8}))
    with pytest.raises(ValueError, match="max_lenght"):
        main(["--config", str(config), *override])


def test_texts_alone_need_no_rouge(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
    args = EvaluateArguments(model_name_or_path=str(files / "model"), texts=str(files / "prose.txt"))
    assert set(run(args)) == {"model", "parameters", "language_modeling"}
    args = EvaluateArguments(model_name_or_path=str(files / "model"), dataset=str(files / "dolly.jsonl"))
    with pytest.raises(ImportError, match=r"pip install 'cbd_hf\[eval\]'"):
        run(args)


def test_nothing_to_evaluate() -> None:
    with pytest.raises(ValueError, match="set texts"):
        EvaluateArguments(model_name_or_path="gpt2")


def test_published_protocol_is_the_default_and_the_recipe() -> None:
    recipe = yaml.safe_load((RECIPES / "configs" / "evaluate.yaml").read_text())
    default = EvaluateArguments(model_name_or_path="gpt2", dataset=recipe["dataset"])
    for name in ("seeds", "max_new_tokens", "max_prompt_length", "temperature", "top_p", "top_k"):
        assert getattr(default, name) == recipe[name]
    assert default.seeds == [10, 20, 30, 40, 50] and default.no_repeat_ngram_size == 6
    training = yaml.safe_load((RECIPES / "configs" / "finetune_dolly.yaml").read_text())
    assert [training[name] for name in ("eval_size", "split_seed")] == [recipe["eval_size"], recipe["split_seed"]]


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_absent_device(device: str, files: Path) -> None:
    args = EvaluateArguments(str(files / "model"), texts=str(files / "prose.txt"), device=device)
    with pytest.raises(ValueError, match=f"device='{device}' is not there: set device to one of cpu"):
        run(args)


def test_named_as_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--max_length", "long"])
    error = capsys.readouterr().err
    assert error.startswith("usage: cbd eval [-h]") and "cbd eval: error: argument --max_length" in error
