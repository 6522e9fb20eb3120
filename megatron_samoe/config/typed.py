"""Plain values of YAML as frozen dataclasses: keys that are unknown, missing or of another type are refused by name."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_samoe.errors import ConfigError, nearest

T = TypeVar("T")


def typed(kind: type[T], content: object, source: str, parent: str = "") -> T:
    """Returns a dataclass from the mapping that a file holds.

    A key is a field's name, with - or _; `from` is the key of a field `from_`. A key without a value counts as missing.

    Args:
        source: name of the file, for messages.
        parent: the key of the mapping itself, such as `sweep`.

    Raises:
        ConfigError: it is not a mapping, a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(parent or source, content, f"must be a mapping in {source}")
    known = {f.name.rstrip("_"): f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints, values = hints_of(kind), {}  # type: ignore[arg-type]
    for key, value in content.items():
        name, at = str(key).replace("-", "_"), _under(parent, key)
        if name not in known:
            raise ConfigError(at, value, f"unknown key in {source}.{nearest(name, known)}")
        if value is not None:
            values[known[name].name] = convert(value, hints[known[name].name], at, source)
    needed = {
        name: f.name in values
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    for name, is_there in needed.items():
        if not is_there:
            raise ConfigError(_under(parent, name), None, f"missing in {source}; needed are {', '.join(needed)}")
    return kind(**values)


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Returns the types of a dataclass's fields. To resolve them takes a millisecond, and a configuration has a dozen classes."""
    return get_type_hints(kind)


def _under(parent: str, key: object) -> str:
    return f"{parent}.{key}" if parent else str(key)


def convert(value: Any, hint: Any, name: str, source: str) -> Any:
    """Returns a YAML value as the type of a field; ConfigError, which says what is allowed, where it is of another."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return typed(hint, value, source, name)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        options = [t for t in parts if t is not type(None)]
        if value is None and len(options) < len(parts):
            return None
        lists = [t for t in options if get_origin(t) is tuple]
        return convert(value, lists[0] if lists and isinstance(value, (list, tuple)) else options[0], name, source)
    if origin is Literal:
        if value in parts and type(value) in {type(a) for a in parts}:
            return value
        allowed = ", ".join(map(repr, parts))
        raise ConfigError(name, value, f"must be one of {allowed} (in {source}).{nearest(str(value), parts)}")
    if origin is tuple and dataclasses.is_dataclass(parts[0]) and isinstance(value, list):
        return tuple(convert(item, parts[0], f"{name}.{index}", source) for index, item in enumerate(value, 1))
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        inner = {str(key): {} if part is None else part for key, part in value.items()}
        return {key: convert(part, parts[1], f"{name}.{key}", source) for key, part in inner.items()}
    found = _list(value, parts[0]) if origin is tuple else _plain(value, hint)
    if found is None:
        expected = f"{parts[0].__name__} list" if origin is tuple else "mapping" if origin else hint.__name__
        raise ConfigError(name, value, f"must be of type {expected} (in {source})")
    return found


def _list(value: Any, kind: Any) -> tuple[Any, ...] | None:
    """Returns the items of a list, or one value as a list of one, converted to a type; None where an item has another. Numbers become text
    where text is asked for."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if kind is str:
        items = [str(v) if isinstance(v, float) else v for v in items]
    found = tuple(_plain(v, kind) for v in items)
    return None if None in found else found


def _plain(value: Any, kind: Any) -> Any:
    """Returns a value by its type; None where it is of another."""
    if isinstance(value, bool):
        return value if kind is bool else None
    if kind is float:  # YAML reads 3e-4, without a dot, as a string
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            return None
    if kind is int:
        return value if isinstance(value, int) else None
    return kind(value) if kind in (str, Path) and isinstance(value, (str, int)) else None
