"""The `cbd` command, and what recipes run. Nothing heavy is imported before a subcommand is chosen."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from cbd_hf import __version__
from cbd_hf._ending import run_and_end


# Subcommand -> (module with `main(argv)`, one line of help).
COMMANDS = {
    "build": ("cbd_hf.commands.build", "distil a chain of anchors from a source model"),
    "bridge": ("cbd_hf.commands.bridge", "reach a source of another tokenizer, by its answers or token by token"),
    "transplant": ("cbd_hf.commands.transplant", "give a model the vocabulary of another tokenizer"),
    "init": ("cbd_hf.commands.init", "make models of any size from a chain"),
    "inspect": ("cbd_hf.commands.inspect", "show a chain as a table; --verify checks every file"),
    "plan": ("cbd_hf.commands.plan", "shape, FLOPs and memory of a chain's sizes, before any is made"),
    "cache": ("cbd_hf.commands.cache", "keep a teacher's predictions, to distil without it"),
    "eval": ("cbd_hf.commands.evaluate", "held-out loss, bits per byte and Rouge-L of a model"),
    "finetune": ("cbd_hf.commands.finetune", "fine-tune a model on instructions"),
    "quickstart": ("cbd_hf.commands.quickstart", "all of it on a small real model, with a report"),
}
_ALIASES = {"evaluate": "eval"}
_EXPECTED = (ValueError, OSError, ImportError)
# The work of one process. Others that a launcher has started would do the same again, into the same files.
_ONE_PROCESS = frozenset({"transplant", "init", "inspect", "plan", "eval"})
_RESUMES = frozenset({"build", "cache", "quickstart"})
_INTERRUPTED = 130  # as a shell says it
_PATIENCE = 10.0  # seconds in which a launcher ends the processes that are left when one has failed
TRACEBACK = "CBD_TRACEBACK"


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="cbd",
        usage="cbd [-h] [--version] command ...",
        description="Chain-based Distillation for Hugging Face.",
        epilog=f"commands:\n{listed}\n\nOptions of a command: cbd <command> --help. Traceback of an error: "
        f"{TRACEBACK}=1.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cbd_hf {__version__}")
    parser.add_argument("command", metavar="command", choices=[*COMMANDS, *_ALIASES], help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run `cbd <command> ...`.

    With several processes (`accelerate launch`) a mistake that all of them find is printed by the first, and what
    one process does is done by the first while the others leave.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; by default those of the process.

    Returns:
        `int`: 0, 2 after a mistake of the user's or 130 after an interruption, which are printed in one line (with
        `CBD_TRACEBACK=1` they are raised instead).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name: str = _parser().parse_args(arguments[:1]).command
    name = _ALIASES.get(name, name)
    rank, processes = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    if name in _ONE_PROCESS and rank > 0:
        return 0
    if name in _ONE_PROCESS and processes > 1:
        print(f"cbd: {name} needs one process; the first of {processes} does it, the others leave.", file=sys.stderr)
    try:
        importlib.import_module(COMMANDS[name][0]).main(_separate_config(arguments[1:]))
    except KeyboardInterrupt:
        if os.environ.get(TRACEBACK):
            raise
        if rank == 0:
            goes_on = " The same command goes on where it was." if name in _RESUMES else ""
            print(f"cbd: interrupted.{goes_on}", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        if rank > 0:
            # If the first process has failed as well, or this one for its sake, the launcher ends it meanwhile.
            time.sleep(_PATIENCE)
        if not _is_mistake(error):
            raise
        where = f" in process {rank}" if rank > 0 else ""
        print(f"cbd: error{where}: {error}", file=sys.stderr)
        return 2
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """
    Run `cbd <command> ...` as the whole of this process.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; by default those of the process.

    Raises:
        SystemExit: with what [`main`] returns.
    """
    run_and_end(lambda: main(argv))


def _is_mistake(error: Exception) -> bool:
    yaml = sys.modules.get("yaml")  # imported by whoever has read a file
    return isinstance(error, _EXPECTED) or (yaml is not None and isinstance(error, yaml.YAMLError))


def _separate_config(arguments: list[str]) -> list[str]:
    """`--config=FILE` as two arguments, the only spelling that TrlParser knows."""
    if arguments and arguments[-1] == "--config":
        raise ValueError("--config needs a value, such as --config recipes/configs/gpt2_chain.yaml.")
    separated = []
    for argument in arguments:
        separated += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    return separated


__all__ = ["COMMANDS", "main", "run"]
