"""Options of a training as a recipe writes them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any


def typed_options(config: type, values: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """
    Options for a dataclass.

    Args:
        config (`type`): whose fields they are.
        values (`Mapping`, *optional*): from a YAML file, which reads 2e-4 as text.
        where (`str`): the place in the recipe, for the message.

    Raises:
        ValueError: one is not a field, is `output_dir`, or is text where a number belongs.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(config) if entry.init}
    result = {}
    for name, value in (values or {}).items():
        if name not in fields or name == "output_dir":
            raise ValueError(f"`{where}` has {name!r}, which is not an option of {config.__name__}.")
        result[name] = _number(value, fields[name].type, f"`{where}`: {name}") if isinstance(value, str) else value
    return result


def _number(text: str, kind: Any, what: str) -> Any:
    """The number that a text means where the field's type, a class or its name, allows numbers alone."""
    kinds = set(re.findall(r"\w+", kind if isinstance(kind, str) else repr(kind))) - _WORDS
    if not kinds or not kinds <= {"float", "int"}:
        return text
    try:
        number = float(text)
    except ValueError as error:
        raise ValueError(f"{what} is {text!r}, but must be a number.") from error
    if "float" in kinds:
        return number
    if not number.is_integer():
        raise ValueError(f"{what} is {text!r}, but must be a whole number.")
    return int(number)


# Of annotations of one type: <class 'int'>, typing.Optional[int], int | None.
_WORDS = {"class", "typing", "Optional", "Union", "None", "NoneType"}


__all__ = ["typed_options"]
