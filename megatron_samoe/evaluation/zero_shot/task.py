"""A task is a YAML file: where its data is, the prompt, the choices and the metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_samoe.errors import ConfigError, DataError, nearest, shown
from megatron_samoe.evaluation.zero_shot.layouts import LAYOUTS
from megatron_samoe.evaluation.zero_shot.metrics import METRICS
from megatron_samoe.evaluation.zero_shot.templates import fields_of
from megatron_samoe.parsing import JsonObject, parse_yaml

TASK_DIR = Path(__file__).parent / "tasks"
Kind = Literal["multiple_choice", "partial", "greedy_match", "generate"]


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
        hub: path, name and split of the data set on the Hugging Face Hub.
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
    choices: tuple[str, ...] | str = ()
    gold: str = ""
    target: str = ""
    answers: str = ""
    group: str = ""
    layout: str = ""
    labels: str = ""
    hub: Mapping[str, str] | None = None
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
_TEXTS = ("name", "description", "context", "gold", "target", "answers", "group", "layout", "labels", "delimiter")
_LISTS = ("files", "metrics", "until", "choices")
_INTEGERS = ("always_yes", "always_no", "max_new_tokens")


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
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable task file: {error}") from error
    return parse_task(content, str(path))


def parse_task(content: object, where: str) -> Task:
    """Returns the task that a file's content describes; DataError as in `load_task`."""
    if not isinstance(content, Mapping):
        raise DataError(f"{where} is no task file: it must hold fields such as name, files, kind, context, metrics.")
    known = {f.name: f for f in fields(Task)}
    for key in content:
        if key not in known:
            raise DataError(f"{where}: {key!r} is no field of a task.{nearest(str(key), known)}")
    needed = [name for name, f in known.items() if f.default is MISSING]
    kind: Any = content.get("kind")
    is_known = isinstance(kind, str) and kind in _NEEDS
    needed += _NEEDS[kind] if is_known else ()
    missing = [name for name in needed if content.get(name) in (None, "", [], ())]
    if missing:
        raise DataError(f"{where}: a task needs the field{'s' * (len(missing) > 1)} {', '.join(missing)}.")
    if not is_known:
        raise DataError(f"{where}: kind {shown(kind)} is not known; allowed are {', '.join(get_args(Kind))}.")
    idle = {name for names in _NEEDS.values() for name in names} - {*_NEEDS[kind], *_MAY_HAVE.get(kind, ())}
    for name in sorted(idle & set(content)):
        raise DataError(f"{where}: {name} has no effect on a task of kind {kind}.")
    values: JsonObject = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
    task = Task(**values)
    _check(task, where)
    return task


def _check(task: Task, where: str) -> None:
    _check_types(task, where)
    for metric in task.metrics:
        known = METRICS.get(metric)
        if known is None:
            raise DataError(
                f"{where}: metric {metric!r} is not known.{nearest(metric, METRICS)} There are {', '.join(METRICS)}."
            )
        if task.kind not in known.kinds:
            raise DataError(f"{where}: metric {metric} has no meaning for kind {task.kind}.")
        if known.needs_group and not task.group:
            raise DataError(f"{where}: metric {metric} needs the field group.")
    if task.layout and task.layout not in LAYOUTS:
        raise DataError(f"{where}: layout {task.layout!r} is not known; allowed are {', '.join(sorted(LAYOUTS))}.")
    if task.hub is not None and not (isinstance(task.hub, Mapping) and {"path", "split"} <= set(task.hub)):
        raise DataError(f"{where}: hub must have path and split (and name, where the data set has several).")
    choices = task.choices if isinstance(task.choices, tuple) else ()
    templates = {"target": task.target, "context": task.context}
    templates |= {f"choices[{number}]": text for number, text in enumerate(choices)}
    for name, template in templates.items():
        try:
            fields_of(template)
        except ValueError as error:
            raise DataError(f"{where}: {name} is no template: {error}.") from None
    for name in ("always_yes", "always_no"):
        value = getattr(task, name)
        if value is not None and not 0 <= value < (len(choices) or value + 1):
            raise DataError(f"{where}: {name} = {value!r} is not the index of a choice, counted from 0.")
    if task.kind == "generate" and task.max_new_tokens < 1:
        raise DataError(f"{where}: max_new_tokens must be 1 or more, not {task.max_new_tokens}.")


def _check_types(task: Task, where: str) -> None:
    for names, fits, wanted in (
        (_TEXTS, lambda value: isinstance(value, str), "a text"),
        (_LISTS, _is_list_of_texts, "a list of texts"),
        (_INTEGERS, lambda value: value is None or type(value) is int, "a whole number"),
    ):
        for name in names:
            value = getattr(task, name)
            if not fits(value) and not (name == "choices" and isinstance(value, str)):
                hint = " (quote yes, no, true and false in YAML)" if name == "choices" else ""
                raise DataError(f"{where}: {name} must be {wanted}, not {shown(value)}{hint}.")
    if not re.fullmatch(r"[\w.-]+", task.name):
        raise DataError(
            f"{where}: name {task.name!r} may have letters, digits, _, - and . only: files are named by it."
        )


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
