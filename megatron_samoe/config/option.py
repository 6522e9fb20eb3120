"""Facts of an option, kept with the option itself, as its type and default are.

Rules, loaders, exporters, the decoder and the planner read them there. So a new option is one field with its facts, and
a reader that does not know the option refuses it by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

Value: TypeAlias = Any
#: Larger numbers are not sizes of anything.
LARGEST = 2**31 - 1
#: Programs other than training that read a model's options: each refuses those it does not know.
READERS = frozenset(("decode", "export", "megatron", "planner"))
NOT_MEGATRON, HERE_ALONE, PLANNER = READERS - {"megatron"}, frozenset(("decode", "planner")), frozenset(("planner",))


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have, as a test and in words."""

    is_legal: Callable[[float], bool]
    words: str


POSITIVE = Range(lambda x: x >= 1, "must be a positive integer")
AT_LEAST_ZERO = Range(lambda x: x >= 0 and math.isfinite(x), "must be a finite number, 0 or more")
ABOVE_ZERO = Range(lambda x: x > 0 and math.isfinite(x), "must be a finite number above 0")
BELOW_ONE = Range(lambda x: 0 <= x < 1, "must be at least 0 and below 1")
#: Rules of several options together say what these may be.
BY_RULES = Range(lambda x: True, "")


@dataclass(frozen=True)
class Need:
    """The condition without which an option has no effect.

    Attributes:
        words: for a user; they may name values of the configuration.
        reads: the options that decide whether it holds.
    """

    is_met: Callable[[Any], bool]
    words: str
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """The facts of an option.

    Attributes:
        range: of a number, or of each of several.
        largest: a larger number is refused before anything is built from it.
        needs: what else must be chosen, else the option has no effect.
        may_be_idle: whether a value other than the default is allowed without what it needs where nobody stated it on a command
            line or in a file: saved dense models have the number of experts of the file that they were trained from.
        may_differ: whether a run may load a checkpoint whose model has another value.
        read_by: readers of a model that handle values other than the default, or a function from such a value to them. A
            default is what a model is without the option, which everyone knows.
    """

    range: Range | None = None
    largest: float = LARGEST
    needs: Need | None = None
    may_be_idle: bool = False
    may_differ: bool = False
    read_by: frozenset[str] | Callable[[Value], frozenset[str]] = READERS

    def has_effect(self, config: Any) -> bool:
        """Returns whether what the option needs is chosen."""
        return self.needs is None or self.needs.is_met(config)

    def is_idle(self, config: Any) -> bool:
        """Returns whether a value other than the default would have no effect, and be an error."""
        return not self.may_be_idle and not self.has_effect(config)

    @property
    def reads(self) -> tuple[str, ...]:
        """Options that decide whether it has an effect."""
        return () if self.needs is None else self.needs.reads

    def what_is_missing(self, config: Any) -> str:
        """Returns what an option that has no effect lacks, for a user."""
        return "" if self.needs is None else self.needs.words.format(c=config)

    def readers_of(self, value: Value) -> frozenset[str]:
        """Returns the readers that know a value."""
        return self.read_by if isinstance(self.read_by, frozenset) else self.read_by(value)


def flag(field: str) -> str:
    """Returns a field's name as the user writes it, --like-this."""
    return "--" + field.replace("_", "-")


def option(default: Value, **facts: Any) -> Any:
    """Returns a dataclass field with its default and its facts."""
    return dataclasses.field(default=default, metadata={"facts": Facts(**facts)})


def model_option(default: Value, read_by: frozenset[str] | Callable[[Value], frozenset[str]], **facts: Any) -> Any:
    """Returns a field of a model's group, which must say who reads it. A loading run may not change it by default."""
    return option(default, read_by=read_by, **facts)


def all_options(config: Any) -> Iterator[tuple[str, str, Value, Value, Facts]]:
    """Yields group, name, value, default and facts of every option of a `PretrainConfig`."""
    for group in config.__dataclass_fields__.values():  # which `dataclasses.fields` copies every time
        options = getattr(config, group.name)
        for field in options.__dataclass_fields__.values():
            yield group.name, field.name, getattr(options, field.name), field.default, field.metadata["facts"]
