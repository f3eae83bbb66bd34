"""`cbd`: which command runs, and what a mistake looks like."""

from __future__ import annotations

import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from cbd_hf import __version__, cli


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Replaces every command; what was called is in the list."""
    calls: list[tuple[str, list[str]]] = []
    for module, _ in cli.COMMANDS.values():
        fake = types.ModuleType(module)
        vars(fake)["main"] = lambda argv, module=module: calls.append((module.rpartition(".")[2], argv))
        monkeypatch.setitem(sys.modules, module, fake)
    return calls


@pytest.mark.parametrize("command", [*cli.COMMANDS, "evaluate"])
def test_dispatch(command: str, called: list[tuple[str, list[str]]]) -> None:
    assert cli.main([command, "--config", "a.yaml", "--help"]) == 0
    module = "evaluate" if command == "eval" else command
    assert called == [(module, ["--config", "a.yaml", "--help"])]


def test_commands_are_those_of_the_issue() -> None:
    assert list(cli.COMMANDS) == [*"build bridge transplant init inspect plan cache eval finetune quickstart".split()]


def test_config_with_equals_sign(called: list[tuple[str, list[str]]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--config=a=b.yaml", "--output_dir=c"]) == 0
    assert called == [("build", ["--config", "a=b.yaml", "--output_dir=c"])]
    assert cli.main(["build", "--config"]) == 2
    assert "--config needs a value" in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in cli.COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"cbd_hf {__version__}"


@pytest.mark.parametrize("arguments", [[], ["bulid"]])
def test_no_such_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "cbd: error:" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FileExistsError, ImportError])
def test_mistakes_are_one_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> None:
        raise error("alpha=2 is outside [0, 1].")

    fake = types.ModuleType("cbd_hf.commands.init")
    vars(fake)["main"] = fail
    monkeypatch.setitem(sys.modules, "cbd_hf.commands.init", fake)
    assert cli.main(["init"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "cbd: error: alpha=2 is outside [0, 1].\n" and not captured.out
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(error, match="outside"):
        cli.main(["init"])


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("cbd_hf.commands.init")
    vars(fake)["main"] = lambda argv: {}["bug"]
    monkeypatch.setitem(sys.modules, "cbd_hf.commands.init", fake)
    with pytest.raises(KeyError):
        cli.main(["init"])


def test_module_and_entry_point(tmp_path: Path) -> None:
    (entry,) = entry_points(group="console_scripts", name="cbd")
    assert entry.load() is cli.main
    command = [sys.executable, "-m", "cbd_hf", "inspect", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert "cbd: error:" in done.stderr and "absent" in done.stderr and "Traceback" not in done.stderr
