"""The options as a JSON schema, for editors that check and complete YAML, and as lines of YAML that explain themselves."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.parsing import JsonObject

#: A number is a word, too: a pattern such as 2.
_PLAIN = {int: "integer", float: "number", bool: "boolean", str: ["string", "number"]}


@functools.cache
def texts_of(group: Any) -> Mapping[str, str]:
    """Returns what the source says of each option of a group, by name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for line, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, ast.Expr):
            if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
                found[line.target.id] = " ".join(text.value.value.split())
    return found


def json_schema() -> JsonObject:
    """Returns the JSON schema (draft 2020-12) of a configuration file: options flat, or under their groups' names."""
    groups = {f.name: type(getattr(PretrainConfig(), f.name)) for f in dataclasses.fields(PretrainConfig)}
    properties: JsonObject = {}
    for group in groups.values():
        properties |= _options(group)
    for name, group in groups.items():
        flat = [properties[name]] if name in properties else []  # an option with the name of its group
        properties[name] = {
            "anyOf": [{"type": ["object", "null"]}, *flat],
            "description": (inspect.getdoc(group) or "").split("\n")[0],
            "properties": _options(group),
            "additionalProperties": False,
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "megatron_samoe configuration",
        "type": "object",
        "properties": properties,
        "patternProperties": {"-": {}},
        "additionalProperties": False,
    }


def _options(group: type) -> JsonObject:
    hints, texts = get_type_hints(group), texts_of(group)
    found = {}
    for field in dataclasses.fields(group):
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        found[field.name] = {
            **_of_type(hints[field.name]),
            "description": texts.get(field.name, ""),
            "default": default,
        }
    return found


def _of_type(hint: Any) -> JsonObject:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        kinds = [{"type": "null"} if one is type(None) else _of_type(one) for one in inner]
        return {"anyOf": kinds}
    if origin is tuple:
        # One value means a list of one, and a line of words is split.
        return {"anyOf": [{"type": "array", "items": _of_type(inner[0])}, _of_type(inner[0]), {"type": "string"}]}
    return {"type": _PLAIN[hint]} if hint in _PLAIN else {}


def explained_yaml(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns options of groups as YAML, each under a comment of what the source says of it.

    Args:
        chosen: by group, values by name; None for an option that is shown, commented out, with its default.
    """
    lines: list[str] = []
    for group, values in chosen.items():
        kind: Any = type(getattr(PretrainConfig(), group))
        defaults, texts = {f.name: f.default for f in dataclasses.fields(kind)}, texts_of(kind)
        lines.append(f"{group}:")
        for name, value in values.items():
            lines += textwrap.wrap(texts[name], 116, initial_indent="  # ", subsequent_indent="  # ")
            shown = defaults[name] if value is None else value
            lines.append(f"  {'# ' if value is None else ''}{name}: {_yaml(shown)}")
        lines.append("")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:.1e}" if isinstance(value, float) and 0 < abs(value) < 1e-2 else str(value)
