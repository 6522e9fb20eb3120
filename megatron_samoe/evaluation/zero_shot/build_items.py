"""From a task's plain rows to the items that are asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_samoe.errors import DataError
from megatron_samoe.evaluation.zero_shot.data_files import read_rows
from megatron_samoe.evaluation.zero_shot.items import Item
from megatron_samoe.evaluation.zero_shot.layouts import Row, plain_rows
from megatron_samoe.evaluation.zero_shot.task import Task, fill


def load_items(task: Task, data_dir: Path | None, limit: int | None = None, hub: bool = False) -> list[Item]:
    """Returns a task's items in the order of its data.

    Args:
        limit: at most so many, but whole questions where items are grouped.

    Raises:
        DataError: there is no data, or a row does not fit the task.
    """
    items = make_items(task, plain_rows(read_rows(task, data_dir, hub), task.layout), limit)
    if not items:
        raise DataError(f"Task {task.name}: its data holds no row.")
    return items


def make_items(task: Task, rows: Iterable[tuple[str, Row]], limit: int | None = None) -> list[Item]:
    """Returns the items of (place, plain row) pairs; see `load_items`."""
    items: list[Item] = []
    for where, row in rows:
        item = _make_item(task, row, where)
        if limit is not None and len(items) >= limit and not (item.group and item.group == items[-1].group):
            break
        items.append(item)
    return items


def _make_item(task: Task, row: Mapping[str, Any], where: str) -> Item:
    def listed(field: str) -> tuple[str, ...]:
        return _texts(task, row, field, where)

    group = fill("{" + task.group + "}", row, where) if task.group else ""
    contexts = listed(task.context) if task.kind == "partial" else (fill(task.context, row, where),)
    if task.kind == "generate":
        return Item(where, contexts, answers=listed(task.answers), group=group)
    if isinstance(task.choices, str):
        texts = listed(task.choices)
    else:
        texts = tuple(fill(choice, row, where) for choice in task.choices)
    continuations, gold = texts, 0
    if task.kind in ("partial", "greedy_match"):
        continuations = (fill(task.target, row, where),)
        texts = texts or (contexts if task.kind == "partial" else continuations)
    if task.kind != "greedy_match":
        gold = _gold(task, row, len(contexts if task.kind == "partial" else texts), where)
    continuations = tuple(task.delimiter + text for text in continuations)
    return Item(where, contexts, continuations, gold, group=group, choice_texts=texts)


def _texts(task: Task, row: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = row.get(field)
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: task {task.name} needs a list of texts in the field {field!r}, not {value!r}.")
    return tuple(value)


def _gold(task: Task, row: Mapping[str, Any], num_choices: int, where: str) -> int:
    value = row.get(task.gold)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(
            f"{where}: task {task.name} needs the index of the right choice in {task.gold!r}, not {value!r}."
        )
    if not 0 <= value < num_choices:
        hint = " Test sets whose labels are kept secret have -1." if value == -1 else ""
        raise DataError(
            f"{where}: label {value} is outside the {num_choices} choices of task {task.name}, 0 to {num_choices - 1}.{hint}"
        )
    return value
