"""Prompt templates: `{name}` stands for a field of the row, `{{` and `}}` for braces. Nothing else is special."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_samoe.errors import DataError

_PART = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")


def fields_of(template: str) -> list[str]:
    """Returns the names of the fields that a template uses.

    Raises:
        ValueError: a brace that is neither doubled nor part of a `{name}`.
    """
    names = []
    for match in _PART.finditer(template):
        if match[0] in ("{", "}"):
            raise ValueError(f"a lone {match[0]} at character {match.start()}; write {match[0] * 2} for a brace")
        if match[1]:
            names.append(match[1])
    return names


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """Returns the template with the row's fields put in, each exactly as it is.

    Raises:
        DataError: the row lacks a field, or has no text or number in it.
    """

    def part(match: re.Match[str]) -> str:
        name = match[1]
        if not name:
            return match[0][0]
        if name not in row:
            raise DataError(f"{where}: there is no field {name!r}; the row has {', '.join(map(str, row))}.")
        value = row[name]
        if not isinstance(value, (str, int, float)):
            raise DataError(f"{where}: field {name!r} must be a text or a number to stand in a prompt, not {value!r}.")
        return str(value)

    return _PART.sub(part, template)
