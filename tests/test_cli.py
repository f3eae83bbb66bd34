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


def test_a_broken_yaml_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "init.yaml"
    path.write_text("chain: [a\nn_params: 1")
    assert cli.main(["init", "--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith("cbd: error: while parsing")


@pytest.mark.parametrize("command", ["transplant", "init", "inspect", "plan", "eval", "evaluate"])
def test_one_process_does_it(
    command: str,
    called: list[tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert cli.main([command]) == 0 and not called and not capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert cli.main([command]) == 0 and len(called) == 1
    assert "needs one process; the first of 3 does it" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build", "bridge", "cache", "finetune", "quickstart"])
def test_all_processes_do_it(
    command: str,
    called: list[tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        assert cli.main([command]) == 0
    assert len(called) == 3 and not capsys.readouterr().err


def test_a_mistake_of_another_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not silent, but leaves the first process the time to say the same."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["build", "--config"]) == 2
    assert capsys.readouterr().err.startswith("cbd: error in process 1: --config needs a value") and waited == [10]
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["build", "--config"]) == 2
    assert capsys.readouterr().err.startswith("cbd: error: --config needs a value") and len(waited) == 1
    # Nor does what the first one's end has caused here, such as a lost connection, hide its message.
    fake = types.ModuleType("cbd_hf.commands.build")
    vars(fake)["main"] = lambda argv: {}["bug"]
    monkeypatch.setitem(sys.modules, "cbd_hf.commands.build", fake)
    for rank, traceback, times in (("0", "", 1), ("1", "", 2), ("1", "1", 2)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv(cli.TRACEBACK, traceback)
        with pytest.raises(KeyError):
            cli.main(["build"])
        assert len(waited) == times


def test_an_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    for command, said in (("build", " The same command goes on where it was."), ("init", "")):
        fake = types.ModuleType(cli.COMMANDS[command][0])
        vars(fake)["main"] = interrupted
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        assert cli.main([command]) == 130
        assert capsys.readouterr().err == f"cbd: interrupted.{said}\n"
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(KeyboardInterrupt):
        cli.main(["build"])


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("cbd_hf.commands.init")
    vars(fake)["main"] = lambda argv: {}["bug"]
    monkeypatch.setitem(sys.modules, "cbd_hf.commands.init", fake)
    with pytest.raises(KeyError):
        cli.main(["init"])


def test_module_and_entry_point(tmp_path: Path) -> None:
    (entry,) = entry_points(group="console_scripts", name="cbd")
    assert entry.load() is cli.run
    command = [sys.executable, "-m", "cbd_hf", "inspect", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert "cbd: error:" in done.stderr and "absent" in done.stderr and "Traceback" not in done.stderr
