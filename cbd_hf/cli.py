"""The `cbd` command. Nothing heavy is imported before a subcommand is chosen."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from cbd_hf import __version__


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

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; by default those of the process.

    Returns:
        `int`: 0, or 2 after a mistake of the user's, which is printed in one line (with `CBD_TRACEBACK=1` it is
        raised instead).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name: str = _parser().parse_args(arguments[:1]).command
    module, _ = COMMANDS[_ALIASES.get(name, name)]
    try:
        importlib.import_module(module).main(_separate_config(arguments[1:]))
    except _EXPECTED as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"cbd: error: {error}", file=sys.stderr)
        return 2
    return 0


def _separate_config(arguments: list[str]) -> list[str]:
    """`--config=FILE` as two arguments, the only spelling that TrlParser knows."""
    if arguments and arguments[-1] == "--config":
        raise ValueError("--config needs a value, such as --config recipes/configs/gpt2_chain.yaml.")
    separated = []
    for argument in arguments:
        separated += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    return separated


__all__ = ["COMMANDS", "main"]
