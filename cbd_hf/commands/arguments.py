"""How the commands read their command line and their YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints


# Of options that TRL gives no choices, so that a misspelt value would be found late or never.
_CHOICES: dict[str, Collection[Any]] = {
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "truncation_mode": ("keep_start", "keep_end"),
}
_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a single value",
    dict: "a mapping",
    list: "a list",
}
_PLURALS = {int: "integers", float: "numbers", bool: "true or false", str: "values", dict: "mappings", list: "lists"}
_BOOLEANS = frozenset({"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"})  # those of HfArgumentParser


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


def parse_options(
    classes: Any, argv: Iterable[str] | None, *, lists: Collection[str] = (), **options: Any
) -> tuple[Any, ...]:
    """
    Dataclasses from a command line and its `--config file.yaml`, whose values are checked like those of the line.

    Args:
        classes (`type` or `tuple[type, ...]`): the dataclasses.
        argv (`Iterable[str]`, *optional*): the arguments; by default those of the process.
        lists (`Collection[str]`, *optional*): options of text that may be lists in YAML.
        options: for `TrlParser`: `prog`, `usage`, `description`.

    Raises:
        ValueError: an unknown option, or a value of a wrong type or outside the choices.
    """
    from trl import TrlParser

    # Here, so that the commands can be imported without TRL.
    class Parser(TrlParser):
        def set_defaults_with_config(self, **config: Any) -> list[str]:
            # Before the dataclasses are made: they compute with the values.
            checked = _checked_config(self, config, lists)
            unknown = super().set_defaults_with_config(**checked)
            if unknown:
                hint = _hint(self, unknown[::2])
                raise ValueError(f"Unknown arguments from config file: {unknown}. {hint}")
            return unknown

        def parse_args_into_dataclasses(  # type: ignore[override]
            self, args: Any = None, return_remaining_strings: bool = False, **others: Any
        ) -> tuple[Any, ...]:
            *parsed, unknown = super().parse_args_into_dataclasses(args, return_remaining_strings=True, **others)
            if unknown:
                hint = _hint(self, [word for word in unknown if word.startswith("--")])
                raise ValueError(f"Unknown arguments on the command line: {unknown}. {hint}")
            return tuple(parsed)

    parser = Parser(classes, **options)
    for action in parser._actions:
        if action.dest in _CHOICES and action.nargs is None and action.choices is None:
            action.choices = _CHOICES[action.dest]
    return parser.parse_args_and_config(args=None if argv is None else list(argv))


def _hint(parser: Any, unknown: Iterable[str]) -> str:
    """The valid options that are nearest to unknown ones, and where all of them are listed."""
    # Aliases and --no_... are options of the command line, but no keys of a YAML file.
    names = {
        option.lstrip("-").replace("-", "_"): action.dest
        for action in parser._actions
        for option in action.option_strings
        if action.dest != "help"
    }
    names |= {dest: dest for dest in names.values()}
    found = []
    for word in unknown:
        name = word.split("=", 1)[0].lstrip("-").replace("-", "_")
        # An option is often remembered without its first words: text_field for dataset_text_field.
        longer = sorted((known for known in names if known.endswith(f"_{name}")), key=len)
        near = [name] if name in names else [*difflib.get_close_matches(name, names, 1, 0.8), *longer]
        found += [names[match] for match in (near or difflib.get_close_matches(name, names, 1))[:1]]
    meant = f"Did you mean {' and '.join(dict.fromkeys(found))}? " if found else ""
    return f"{meant}All options: {parser.prog} --help."


def _checked_config(parser: Any, config: Mapping[str, Any], lists: Collection[str]) -> dict[str, Any]:
    """The values of a YAML file, with numbers of the type that their option has."""
    choices = _CHOICES | {action.dest: action.choices for action in parser._actions if action.choices}
    checked = dict(config)
    for kind in parser.dataclass_types:
        hints = get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            if not entry.init or entry.name not in config:
                continue
            name, value, hint = entry.name, config[entry.name], hints[entry.name]
            alternatives = _alternatives(hint)
            if value is None and (entry.default is None or types.NoneType in alternatives):
                continue
            if name in choices and not (isinstance(value, bool) and bool in alternatives):
                checked[name] = _chosen(name, value, choices[name], alternatives)
                continue
            if name in lists and isinstance(value, list):
                hint = list[Any]
            try:
                checked[name] = _typed(value, hint, _is_own(kind, name))
            except TypeError:
                raise ValueError(
                    f"{name}={value!r} in the config or on the command line must be {_description(hint)}."
                ) from None
    return checked


def _chosen(name: str, value: Any, choices: Collection[Any], alternatives: tuple[Any, ...]) -> Any:
    if isinstance(value, list) and any(get_origin(kind) is list or kind is list for kind in alternatives):
        return [_chosen(name, part, choices, ()) for part in value]
    if isinstance(value, str) and value.lower() in ("none", "null") and types.NoneType in alternatives:
        return value  # HfArgumentParser reads it as no value
    # YAML reads a 2 as a number where the choices are texts.
    found = [choice for choice in choices if choice == value or str(choice) == str(value)]
    if isinstance(value, Enum) or found:
        return value if isinstance(value, Enum) else found[0]
    quoted = ", in quotes" if isinstance(value, bool) else ""  # YAML reads a bare no as false
    raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}{quoted}.")


def _typed(value: Any, hint: Any, own: bool) -> Any:
    """
    A value of YAML as its option takes it.

    Options of transformers and TRL (`own` is false) take more than their annotations say: only what they cannot
    compute with is refused.

    Raises:
        TypeError: it is certainly of a wrong type.
    """
    kinds = {get_origin(kind) or kind: kind for kind in _alternatives(hint)}
    if not kinds.keys() <= {*_NAMES, types.NoneType}:
        return value  # any type, or a class of its own
    numbers = kinds.keys() & {int, float}
    lenient = not own and bool(kinds.keys() & {str, list, dict})
    if lenient and not (list in kinds and isinstance(value, list)):
        if isinstance(value, str | bool | list | dict | None) or str in kinds:
            return value
    if value is None:
        if numbers or own and bool not in kinds:
            raise TypeError
        return value
    if isinstance(value, bool):
        return _accepted(value, bool in kinds)
    if isinstance(value, int):
        return _accepted(value, bool(numbers) or str in kinds or bool in kinds and value in (0, 1))
    if isinstance(value, float):
        if numbers == {int} and str not in kinds:
            return int(_accepted(value, value.is_integer()))
        return _accepted(value, bool(numbers) or str in kinds)
    if isinstance(value, str):
        return value if str in kinds else _from_text(value, kinds)
    if isinstance(value, list):
        parts = get_args(_accepted(kinds.get(list), list in kinds))
        return [_typed(part, parts[0], own) for part in value] if parts else value
    if isinstance(value, dict):
        return _accepted(value, dict in kinds)
    return _accepted(value, not numbers and bool not in kinds)


def _accepted(value: Any, accepted: bool) -> Any:
    if not accepted:
        raise TypeError
    return value


def _from_text(text: str, kinds: Mapping[Any, Any]) -> Any:
    """A text where a number or a truth value belongs: YAML reads 1e-4 as text."""
    if types.NoneType in kinds and text.lower() in ("none", "null"):
        return None
    if bool in kinds and text.lower() in _BOOLEANS:
        return text
    try:
        number = float(_accepted(text, bool(kinds.keys() & {int, float})))
    except ValueError:
        raise TypeError from None
    if float in kinds:
        return number
    return int(_accepted(number, number.is_integer()))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_own(kind: type, name: str) -> bool:
    """Whether it is this package that declares a dataclass's field."""
    owner = next(base for base in kind.__mro__ if name in inspect.get_annotations(base))
    return owner.__module__.partition(".")[0] == __name__.partition(".")[0]


def _description(hint: Any) -> str:
    described = []
    for kind in _alternatives(hint):
        parts = get_args(kind)
        origin = get_origin(kind) or kind
        if origin is list and parts and (get_origin(parts[0]) or parts[0]) in _PLURALS:
            described.append(f"a list of {_PLURALS[get_origin(parts[0]) or parts[0]]}")
        elif origin in _NAMES:
            described.append(_NAMES[origin])
    return " or ".join(dict.fromkeys(described)) or str(hint)


__all__ = ["chain_first", "parse_options"]
