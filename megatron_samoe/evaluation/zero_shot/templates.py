"""Prompt templates: `{name}` stands for a field of the row, `{{` and `}}` for braces. Nothing else is special."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from megatron_samoe.errors import DataError


def fault_of(template: str) -> str:
    """Returns why a text is no template; empty where it is one."""
    try:
        for _, name, form, conversion in string.Formatter().parse(template):
            if form or conversion or not (name is None or name.isidentifier()):
                return "between braces stands the name of a field alone; write {{ and }} for braces"
    except ValueError as error:
        return f"{error}; write {{{{ and }}}} for braces"
    return ""


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """Returns the template with the row's fields put in, each exactly as it is.

    Raises:
        DataError: the row lacks a field, or has no text or number in it.
    """
    parts = []
    for text, name, _, _ in string.Formatter().parse(template):
        parts.append(text)
        if name is None:
            continue
        if name not in row:
            raise DataError(f"{where}: there is no field {name!r}; the row has {', '.join(map(str, row))}.")
        if not isinstance(row[name], (str, int, float)):
            raise DataError(
                f"{where}: field {name!r} must be a text or a number to stand in a prompt, not {row[name]!r}."
            )
        parts.append(str(row[name]))
    return "".join(parts)
