"""Rules of several options together: the option that is refused, when, and what is allowed.

A table is a function of configuration and world size that yields rules. It is arithmetic, and runs before any process
group is made. It may divide by any number of the groups that it names: it is not asked where one of these is out of range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from megatron_samoe.config.option import Need
from megatron_samoe.config.pretrain import PretrainConfig


class FromConfig:
    """The configuration's own value of a rule's option."""


@dataclass(frozen=True)
class Rule:
    """A rule over several options. Of a table's rules for one option the first that is broken is reported.

    Args:
        option: the option that is refused.
        is_broken: the condition, by its truth.
        allowed: the sentence after the option and its value: what is allowed.
        value: the value to show, where it is not the configuration's.
    """

    option: str
    is_broken: object
    allowed: str
    value: Any = FromConfig


Rules: TypeAlias = Iterator[Rule]


class Table(NamedTuple):
    """Rules, the groups of options whose numbers must be in their ranges, and what else must be chosen."""

    groups: tuple[str, ...]
    rules: Callable[[PretrainConfig, int], Rules]
    needs: Need | None = None
