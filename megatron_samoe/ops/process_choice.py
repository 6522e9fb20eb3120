"""A choice that holds for all of this process, and that a block may replace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ProcessChoice(Generic[T]):
    """The current `value` of a choice. Ops read it; the start of a run sets it."""

    def __init__(self, value: T):
        self.value = value

    @contextlib.contextmanager
    def replaced_by(self, value: T) -> Iterator[None]:
        """Inside, the value is another."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before
