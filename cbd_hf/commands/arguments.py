"""How the commands about a chain read their command line."""

from __future__ import annotations

from collections.abc import Sequence


def chain_first(argv: Sequence[str], config_option: str) -> list[str]:
    """
    The arguments with the chain named, which may stand first without its name, and with `--config` as `config_option`
    where its value is a model's config and not a recipe in YAML.
    """
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--chain")
    for index, (option, value) in enumerate(zip(arguments, arguments[1:], strict=False)):
        if option == "--config" and not value.endswith((".yaml", ".yml")):
            arguments[index] = config_option
    return arguments


__all__ = ["chain_first"]
