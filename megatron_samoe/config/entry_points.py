"""Additions of installed packages, by the entry points that they name."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from megatron_samoe.errors import ConfigError


def added(group: str) -> Iterator[tuple[str, str, Any]]:
    """Yields the additions of packages to a group: their entry point and its value, for messages, and the object.

    Raises:
        ConfigError: one cannot be loaded.
    """
    for point in entry_points(group=group):
        entry = f"{group}: {point.name} of {point.dist.name if point.dist is not None else 'a package'}"
        try:
            found = point.load()
        except Exception as error:
            raise ConfigError(entry, point.value, f"cannot be loaded: {error}") from error
        yield entry, point.value, found
