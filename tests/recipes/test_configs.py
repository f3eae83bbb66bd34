"""Recipes and their YAML files: every option exists, every command in a header would start."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from cbd_hf import cli

from ..test_clients import SENTENCES, make_target, write_lines


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))
# Recipe -> module of its command and the dataclasses that its YAML file fills.
DATACLASSES = {
    "bridge cache": ("bridge_cache", "BridgeCacheArguments"),
    "bridge generate": ("bridge", "GenerateArguments"),
    "bridge train": ("bridge_train", "BridgeArguments", "BridgeDistillationConfig"),
    "build_chain": ("build", "BuildArguments", "StepwiseDistillationConfig"),
    "cache_teacher": ("cache", "CacheArguments"),
    "evaluate": ("evaluate", "EvaluateArguments"),
    "finetune_dolly": ("finetune", "FinetuneArguments", "FinetuneConfig", "ModelConfig"),
    "init_from_chain": ("init", "InitArguments"),
    "quickstart": ("quickstart", "QuickstartArguments", "StepwiseDistillationConfig"),
    "transplant_vocabulary": ("transplant", "TransplantArguments"),
}


def header(path: Path) -> str:
    """The comment lines at the top of a YAML file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def commands(text: str) -> list[list[str]]:
    """The `accelerate launch` commands in a text, as words; a line that ends in a backslash goes on."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = (re.sub(r"^(\w+=\w+ )+", "", line.strip()) for line in joined.splitlines())
    return [shlex.split(line) for line in lines if line.startswith("accelerate launch")]


def recipe_call(command: list[str]) -> tuple[str, list[str]]:
    """(recipe's name, with its stage if it has some; its arguments) of an `accelerate launch` command."""
    position = next(index for index, word in enumerate(command) if word.endswith(".py"))
    recipe, arguments = Path(command[position]).stem, command[position + 1 :]
    stage = f"{recipe} {arguments[0]}" if arguments else ""
    return (stage, arguments[1:]) if stage in DATACLASSES else (recipe, arguments)


def parse(recipe: str, arguments: list[str]) -> tuple[Any, ...]:
    from trl import TrlParser

    name, *classes = DATACLASSES[recipe]
    module = importlib.import_module(f"cbd_hf.commands.{name}")
    arguments = [str(ROOT / word) if word.startswith("recipes/") else word for word in arguments]
    return TrlParser([getattr(module, part) for part in classes]).parse_args_and_config(arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config(path: Path) -> None:
    text = header(path)
    assert re.search(r"^Hardware\b.*:", text, re.MULTILINE), "the header has no line that names the hardware"
    assert "Not run here" in text or "Measured" in text
    found = commands(text)
    assert found, "the header has no command"
    for command in found:
        recipe, arguments = recipe_call(command)
        assert (ROOT / "recipes" / f"{recipe.split()[0]}.py").is_file()
        assert f"recipes/configs/{path.name}" in arguments
        # An unknown or misspelt key raises, and so does a value out of its range.
        parsed = parse(recipe, arguments)
        if recipe == "build_chain":
            from cbd_hf.distillation.recipe import check_recipe

            check_recipe(*parsed)


def test_gpt2_chain_is_the_papers() -> None:
    from transformers import SchedulerType

    args, training = parse("build_chain", ["--config", "recipes/configs/gpt2_chain.yaml"])
    assert [anchor["checkpoint"].rpartition("/")[2] for anchor in args.anchors] == [
        "gpt2-large",
        "gpt2-medium",
        "gpt2",
    ]
    assert args.source.endswith("gpt2-xl") and args.dataset == "databricks/databricks-dolly-15k"
    assert args.data_format == "instructions"
    assert all(phase["num_train_epochs"] == 3 for phase in (args.supervised, *(a["supervised"] for a in args.anchors)))
    assert (training.objective, training.max_steps, training.max_length) == ("reverse_kl", 5000, 512)
    assert (training.temperature, training.lmbda, training.learning_rate) == (1.0, 0.0, 5e-6)
    assert training.lr_scheduler_type == SchedulerType.CONSTANT_WITH_WARMUP
    launcher = load_config_from_file(str(ROOT / "recipes" / "accelerate_configs" / "ddp.yaml"))
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * launcher.num_processes
    assert batch == 32


@pytest.mark.parametrize(("name", "source"), [("llama3", "meta-llama/Meta-Llama-3-8B"), ("qwen3", "Qwen/Qwen3-4B")])
def test_heterogeneous_chains_are_the_papers(name: str, source: str) -> None:
    args, training = parse("build_chain", ["--config", f"recipes/configs/{name}_gpt2_chain.yaml"])
    homogeneous, stepwise = parse("build_chain", ["--config", "recipes/configs/gpt2_chain.yaml"])
    assert args.source == source and args.bridge["checkpoint"] == homogeneous.source
    assert args.bridge["method"] == "sequence" and len(args.sizes) == 3
    # App. B: the source 3 epochs, the bridge 10 epochs with batch 8, both at 1e-5.
    assert args.bridge["supervised"]["num_train_epochs"] == 3 and args.bridge["training"]["num_train_epochs"] == 10
    assert args.bridge["supervised"]["learning_rate"] == args.bridge["training"]["learning_rate"] == 1e-5
    launcher = load_config_from_file(str(ROOT / "recipes" / "accelerate_configs" / "zero3.yaml"))
    options = args.bridge["training"]
    rows = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    assert rows * launcher.num_processes == 8
    # Behind the bridge it is the homogeneous chain.
    assert args.anchors == homogeneous.anchors and args.dataset == homogeneous.dataset
    for option in ("objective", "max_steps", "max_length", "temperature", "learning_rate", "warmup_steps"):
        assert getattr(training, option) == getattr(stepwise, option), option


@pytest.mark.parametrize("phase", ["source", "gpt2-large", "gpt2-medium", "gpt2"])
def test_supervised_options_exist(phase: str, tmp_path: Path) -> None:
    from trl import SFTConfig

    args, _ = parse("build_chain", ["--config", "recipes/configs/gpt2_chain.yaml"])
    options = {"source": args.supervised} | {anchor["name"]: anchor["supervised"] for anchor in args.anchors}
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options[phase])
    assert config.num_train_epochs == 3


def test_misspelt_key_is_refused(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "recipes" / "configs" / "gpt2_chain.yaml").read_text()) | {"learning_rat": 1}
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="learning_rat"):
        parse("build_chain", ["--config", str(path)])


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launcher(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes >= 1
    text = header(path)
    assert re.search(r"^Hardware\b.*:", text, re.MULTILINE)
    (command,) = commands(text)
    assert command[2:4] == ["--config_file", f"recipes/accelerate_configs/{path.name}"]
    assert recipe_call(command)[0] == "build_chain"


def test_launchers_are_those_of_the_docs() -> None:
    assert {path.stem for path in LAUNCHERS} >= {"single", "cpu", "cpu_2proc", "ddp", "zero2", "zero3"}
    # `accelerate launch` starts a single process for MULTI_CPU unless there is mpirun.
    assert all(load_config_from_file(str(path)).distributed_type != "MULTI_CPU" for path in LAUNCHERS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    assert re.search(r"^Hardware\b.*:", text, re.MULTILINE)
    assert commands(text) and all(recipe_call(command)[0].split()[0] == path.stem for command in commands(text))
    for command in commands(text):
        for word in command:
            assert not word.startswith("recipes/") or (ROOT / word).is_file(), word
    # recipes/evaluate.py must not be what `import evaluate` finds.
    assert source.index("sys.path.pop(0)") < source.index("from cbd_hf.cli import")
    assert source.count(" import ") == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
@pytest.mark.parametrize("code", [0, 2])
def test_recipe_is_a_command(path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command's exit code; a mistake is the command's one line."""
    called: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        called.append(arguments)
        return code

    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setattr(sys, "argv", [str(path), "--config", "a.yaml"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    ((command, *arguments),) = called
    assert stopped.value.code == code and arguments == ["--config", "a.yaml"]
    name = next(name for name in DATACLASSES if name.split()[0] == path.stem)
    assert cli.COMMANDS[command][0] == f"cbd_hf.commands.{DATACLASSES[name][0].split('_')[0]}"


@pytest.mark.parametrize("recipe", ["evaluate.py", "build_chain.py"])
def test_recipe_folder_does_not_hide_libraries(recipe: str, tmp_path: Path) -> None:
    """A `sitecustomize` looks for `evaluate` as the recipe ends, in the recipe's own process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, importlib.util\n"
        "atexit.register(lambda: print('found:', importlib.util.find_spec('evaluate').origin))\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / recipe), "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"^found: (.*)$", done.stdout, re.MULTILINE)
    assert Path(found).parent.name == "evaluate" and "recipes" not in Path(found).parts


def test_rouge_l_by_the_recipe(tmp_path: Path) -> None:
    make_target(tmp_path / "model")
    rows = [{"instruction": f"Say {i}.", "context": "", "response": text} for i, text in enumerate(SENTENCES)]
    write_lines(tmp_path / "dolly.jsonl", rows)
    command = [sys.executable, str(ROOT / "recipes" / "evaluate.py")]
    command += ["--config", str(ROOT / "recipes" / "configs" / "evaluate.yaml"), "--seeds", "10", "--eval_size", "2"]
    command += ["--model_name_or_path", "model", "--dataset", "dolly.jsonl", "--max_new_tokens", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--output_file", "scores.json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["rouge_l"]["examples"] == 2 and 0 <= scores["rouge_l"]["mean"] <= 100
