"""Rules of several options together, as rows: the option that is refused, when, and in which words.

A table is a function of configuration and world size that yields rows. It is arithmetic, and runs before any process
group is made. It may divide by any number of the groups that it names: it is not asked where one of these is out of range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from megatron_samoe.config.option import Need
from megatron_samoe.config.pretrain import PretrainConfig

#: Option, whether it is refused, what is allowed, and its value where that is not the configuration's. Of the rows of one
#: option in a table the first that holds is reported.
Row: TypeAlias = tuple[str, object, str] | tuple[str, object, str, Any]
Rows: TypeAlias = Iterator[Row]


class Table(NamedTuple):
    """Rows, the groups of options whose numbers must be in their ranges, and what else must be chosen."""

    groups: tuple[str, ...]
    rows: Callable[[PretrainConfig, int], Rows]
    needs: Need | None = None
