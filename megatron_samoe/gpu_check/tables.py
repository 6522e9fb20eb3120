"""Rows of named figures as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_samoe.evaluation.run_summary import format_table


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows under the names of their figures."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return format_table([names, *([_cell(row.get(name)) for name in names] for row in rows)])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 10 else f"{value:,.1f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
