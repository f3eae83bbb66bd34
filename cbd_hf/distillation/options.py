"""Options of a training as a recipe writes them."""

from __future__ import annotations

import dataclasses
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
        ValueError: one is not a field, or is `output_dir`.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(config) if entry.init}
    result = {}
    for name, value in (values or {}).items():
        if name not in fields or name == "output_dir":
            raise ValueError(f"`{where}` has {name!r}, which is not an option of {config.__name__}.")
        default = fields[name].default
        if isinstance(value, str) and isinstance(default, int | float) and not isinstance(default, bool):
            value = float(value)
        result[name] = value
    return result


__all__ = ["typed_options"]
