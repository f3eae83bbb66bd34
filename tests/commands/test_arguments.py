"""Values and names of options in a YAML file are checked as on the command line."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cbd_hf import cli
from cbd_hf.commands.arguments import parse_options


# Command -> module and dataclasses, and options that it cannot do without.
COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "build": (
        ("cbd_hf.distillation.recipe", "BuildArguments", "StepwiseDistillationConfig"),
        {"source": "a", "dataset": "b", "output_dir": "c", "anchors": [{"name": "small", "num_hidden_layers": 1}]},
    ),
    "cache": (
        ("cbd_hf.commands.cache", "CacheArguments"),
        {"teacher_model_name_or_path": "a", "dataset": "b", "output_dir": "c"},
    ),
    "eval": (("cbd_hf.commands.evaluate", "EvaluateArguments"), {"model_name_or_path": "a", "texts": "b"}),
    "finetune": (
        ("cbd_hf.commands.finetune", "FinetuneArguments", "FinetuneConfig", "ModelConfig"),
        {"model_name_or_path": "a", "output_dir": "c"},
    ),
    "init": (("cbd_hf.commands.init", "InitArguments"), {"chain": "a", "n_params": 1, "output_dir": "c"}),
}


def write(command: str, tmp_path: Path, values: dict[str, Any]) -> Path:
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump(COMMANDS[command][1] | values))
    return path


def parse(command: str, tmp_path: Path, values: dict[str, Any]) -> dict[str, Any]:
    module, *names = COMMANDS[command][0]
    classes = [getattr(importlib.import_module(module), name) for name in names]
    config = str(write(command, tmp_path, values))
    parsed = parse_options(classes, ["--config", config], prog=f"cbd {command}", lists=["n_params"])
    return {name: value for part in parsed for name, value in vars(part).items()}


@pytest.mark.parametrize(
    ("command", "option", "value", "expected"),
    [
        ("build", "data_format", "txt", "one of columns, instructions, text."),
        ("cache", "data_format", "txt", "one of columns, instructions, text."),
        ("build", "packing_strategy", "bdf", "one of bfd, bfd_split, wrapped."),
        ("cache", "packing_strategy", "bdf", "one of bfd, bfd_split, wrapped."),
        ("cache", "dtype", "fp8", "one of auto, "),
        ("eval", "dtype", "fp8", "one of auto, "),
        ("finetune", "dtype", "fp8", "one of auto, "),
        ("build", "lr_scheduler_type", "cosinus", "one of linear, cosine, "),
        ("build", "save_strategy", False, "one of no, steps, epoch, best, in quotes."),
        ("build", "max_steps", [4], "an integer."),
        ("build", "max_steps", None, "an integer."),
        ("build", "max_steps", True, "an integer."),
        ("build", "max_steps", float("inf"), "an integer."),
        ("build", "max_documents", 1.5, "an integer."),
        ("build", "max_length", [1], "an integer."),
        ("build", "learning_rate", "high", "a number."),
        ("build", "packing", "maybe", "true or false."),
        ("build", "anchors", {"name": "small"}, "a list of mappings."),
        ("build", "anchors", ["small"], "a list of mappings."),
        ("build", "supervised", [1], "a mapping."),
        ("build", "hidden_loss_layers", 3, "a list of integers."),
        ("build", "sizes", "138M", "a list of values."),
        ("eval", "seeds", 10, "a list of integers."),
        ("init", "alpha", [1], "a single value."),
        ("init", "output_dir", None, "a single value."),
    ],
)
def test_refused(
    command: str,
    option: str,
    value: Any,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line, before anything is loaded."""
    assert cli.main([command, "--config", str(write(command, tmp_path, {option: value}))]) == 2
    where = "" if expected.startswith("one of") else " in the config or on the command line"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cbd: error: {option}={value!r}{where} must be {expected}")


@pytest.mark.parametrize(
    ("command", "option", "value", "parsed"),
    [
        ("build", "learning_rate", "1e-4", 1e-4),
        ("build", "learning_rate", 1, 1),
        ("build", "max_documents", 3.0, 3),
        ("build", "max_documents", "none", None),
        ("build", "seed", "7", 7),
        ("build", "max_length", None, None),
        ("build", "packing", "yes", True),
        ("build", "packing", 1, 1),
        ("build", "pad_to_multiple_of", 8, 8),
        ("build", "save_steps", 0.5, 0.5),
        ("build", "resume_from_checkpoint", True, True),
        ("build", "report_to", ["tensorboard"], ["tensorboard"]),
        ("build", "lr_scheduler_kwargs", {"num_cycles": 1}, {"num_cycles": 1}),
        ("build", "gradient_checkpointing_kwargs", '{"use_reentrant": false}', {"use_reentrant": False}),
        ("build", "hidden_loss_weight", 0, 0),
        ("cache", "k", "1e1", 10),
        ("cache", "hidden", None, None),
        ("eval", "seeds", ["10", 20], [10, 20]),
        ("eval", "device", "none", "none"),
        ("finetune", "lora_target_modules", "all-linear", "all-linear"),
        ("finetune", "lora_target_modules", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("init", "n_params", [1, "2e6"], [1, "2e6"]),
        ("init", "alpha", 0.5, 0.5),
    ],
)
def test_accepted(command: str, option: str, value: Any, parsed: Any, tmp_path: Path) -> None:
    assert parse(command, tmp_path, {option: value})[option] == parsed


@pytest.mark.parametrize(
    ("command", "option", "meant"),
    [
        ("build", "text_field", "dataset_text_field"),
        ("build", "learning_rat", "learning_rate"),
        ("eval", "top_q", "top_p"),
        ("cache", "teacher", "teacher_model_name_or_path"),
    ],
)
def test_unknown_key(command: str, option: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        parse(command, tmp_path, {option: 1})
    assert str(refused.value) == (
        f"Unknown arguments from config file: ['--{option}', '1']. Did you mean {meant}? "
        f"All options: cbd {command} --help."
    )


def test_unlike_any_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "--config", str(write("init", tmp_path, {"zzzzz": 1}))]) == 2
    error = capsys.readouterr().err
    assert "['--zzzzz', '1']. All options: cbd init --help." in error and "Did you mean" not in error


def test_unknown_option_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["a", "--n_params", "1", "--output_dir", "b", "--expantion=replicate"]
    assert cli.main(["init", *words]) == 2
    assert "['--expantion=replicate']. Did you mean expansion? All options: cbd init" in capsys.readouterr().err


def test_choices_of_trl_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["build", "--packing_strategy", "bdf"])
    assert "invalid choice: 'bdf'" in capsys.readouterr().err


@pytest.mark.parametrize("anchors", [{"name": "small"}, ["small"]])
def test_anchors_given_to_the_builder(anchors: Any, tmp_path: Path) -> None:
    from cbd_hf import StepwiseDistillationConfig
    from cbd_hf.distillation.recipe import BuildArguments, check_recipe

    args = BuildArguments(source="a", dataset="b", anchors=anchors)
    with pytest.raises(ValueError, match="anchors=.* must be a list of mappings"):
        check_recipe(args, StepwiseDistillationConfig(output_dir=str(tmp_path)))


@pytest.mark.parametrize("command", ["build", "finetune"])
def test_shortest_rows(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--config", str(write(command, tmp_path, {"max_length": 1}))]) == 2
    assert "max_length=1 must be at least 2" in capsys.readouterr().err
