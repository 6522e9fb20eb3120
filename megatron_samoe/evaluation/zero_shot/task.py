"""A task is a YAML file: where its data is, the prompt, the choices and the metrics.

In a prompt `{name}` stands for a field of the row, `{{` and `}}` for braces. Nothing else is special.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_samoe.config.typed import typed
from megatron_samoe.errors import ConfigError, DataError, nearest
from megatron_samoe.evaluation.zero_shot.layouts import LAYOUTS
from megatron_samoe.evaluation.zero_shot.metrics import METRICS
from megatron_samoe.parsing import parse_yaml, read_text

TASK_DIR = Path(__file__).parent / "tasks"
Kind = Literal["multiple_choice", "partial", "greedy_match", "generate"]


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face Hub; it has a name where it has several parts."""

    path: str
    split: str
    name: str | None = None


@dataclass(frozen=True)
class Task:
    """One task; the fields of its YAML file.

    Attributes:
        name: what --tasks calls it.
        description: one line for --list-tasks.
        files: names of the data below --data-dir without their ending, the first found counts; `*` as in a shell, and a
            folder stands for all files in it.
        kind: multiple_choice ranks continuations of one context, partial ranks contexts by one continuation,
            greedy_match asks whether the continuation is what greedy decoding gives, generate decodes and compares.
        context: template of what the model reads; for partial the name of a field that lists contexts.
        choices: templates of the choices, or the name of the field that lists them.
        gold: field with the index of the right choice (from 0).
        target: template of the one continuation of partial and greedy_match.
        answers: field that lists the texts that count as right (generate).
        group: field whose value puts items into one question, where a metric counts whole questions.
        metrics: names of `metrics.METRICS`; the first is what tables show first.
        layout: function of `layouts.LAYOUTS` that reads the official forms of the data; none: rows are used as they are.
        labels: file beside the data with one label per line, where the official form keeps them apart.
        hub: the data set on the Hugging Face Hub.
        always_yes, always_no: choices that the constant predictors take; the first and the last if not given.
        delimiter: stands between context and continuation.
        until: generation stops before the first of these.
        max_new_tokens: longest answer that is generated.
    """

    name: str
    description: str
    files: tuple[str, ...]
    kind: Kind
    context: str
    metrics: tuple[str, ...]
    choices: str | tuple[str, ...] = ()
    gold: str = ""
    target: str = ""
    answers: str = ""
    group: str = ""
    layout: str = ""
    labels: str = ""
    hub: Hub | None = None
    always_yes: int | None = None
    always_no: int | None = None
    delimiter: str = " "
    until: tuple[str, ...] = ()
    max_new_tokens: int = 0


#: Fields that a kind of task needs besides those that all need; another kind's have no effect.
_NEEDS: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("choices", "gold"),
    "partial": ("gold", "target"),
    "greedy_match": ("target",),
    "generate": ("answers", "until", "max_new_tokens"),
}
_MAY_HAVE: dict[str, tuple[str, ...]] = {"partial": ("choices",)}


def task_names() -> list[str]:
    """Returns the names of the tasks that come with the package."""
    return sorted(path.stem for path in TASK_DIR.glob("*.yaml"))


def load_task(name: str) -> Task:
    """Returns the task of a name, or of a path that ends in .yaml.

    Raises:
        ConfigError: there is no such task.
        DataError: the file is no task: a field is missing, unknown or of the wrong form.
    """
    known, path = task_names(), TASK_DIR / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError("--tasks", name, "names a task file that is not there")
    elif name not in known:
        raise ConfigError("--tasks", name, f"must be one of {', '.join(known)}, or a .yaml file.{nearest(name, known)}")
    try:
        content = parse_yaml(read_text(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable task file: {error}") from error
    return parse_task(content, str(path))


def parse_task(content: object, where: str) -> Task:
    """Returns the task that a file's content describes; DataError as in `load_task`."""
    try:
        task = typed(Task, content, where)
    except ConfigError as error:
        hint = " Quote yes, no, true and false in YAML." if error.field == "choices" else ""
        raise DataError(f"{where} is no task file: {error}.{hint}") from None
    for is_right, wrong in _rules(task):
        if not is_right:
            raise DataError(f"{where}: {wrong}.")
    return task


def _rules(task: Task) -> Iterator[tuple[bool, str]]:
    """Yields what must hold of a task beyond the types of its fields, and what is wrong where it does not."""
    plain_name = re.fullmatch(r"[\w.-]+", task.name) is not None
    yield plain_name, f"name {task.name!r} may have letters, digits, _, - and . only: files are named by it"
    needs = _NEEDS[task.kind]
    missing = [name for name in ("description", "files", "context", "metrics", *needs) if not getattr(task, name)]
    yield not missing, f"a task of kind {task.kind} needs the fields {', '.join(missing)}"
    for name in sorted({name for names in _NEEDS.values() for name in names} - {*needs, *_MAY_HAVE.get(task.kind, ())}):
        yield not getattr(task, name), f"{name} has no effect on a task of kind {task.kind}"
    for name in task.metrics:
        metric, close = METRICS.get(name), nearest(name, METRICS)
        yield metric is not None, f"metric {name!r} is not known.{close} There are {', '.join(METRICS)}"
        assert metric is not None
        yield task.kind in metric.kinds, f"metric {name} has no meaning for kind {task.kind}"
        yield bool(task.group) or not metric.needs_group, f"metric {name} needs the field group"
    layouts = ", ".join(sorted(LAYOUTS))
    yield task.layout in ("", *LAYOUTS), f"layout {task.layout!r} is not known; allowed are {layouts}"
    choices = task.choices if isinstance(task.choices, tuple) else ()
    templates = {"target": task.target, "context": task.context}
    templates |= {f"choices[{number}]": text for number, text in enumerate(choices)}
    for name, template in templates.items():
        fault = fault_of(template)
        yield not fault, f"{name} is no template: {fault}"
    for name, value in (("always_yes", task.always_yes), ("always_no", task.always_no)):
        is_index = value is None or 0 <= value < (len(choices) or value + 1)
        yield is_index, f"{name} = {value!r} is not the index of a choice, counted from 0"
    is_length = task.kind != "generate" or task.max_new_tokens > 0
    yield is_length, f"max_new_tokens must be 1 or more, not {task.max_new_tokens}"


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
