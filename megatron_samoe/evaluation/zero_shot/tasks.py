"""Tasks of lm-evaluation-harness (extra `eval`): by name or YAML file, with data of a local folder where it has some."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from megatron_samoe.config.typed import typed
from megatron_samoe.errors import ConfigError, DataError, MegatronSamoeError, nearest, nearest_file, optional_import
from megatron_samoe.evaluation.zero_shot.data_files import NoDataError, find_data, read_rows
from megatron_samoe.evaluation.zero_shot.published_forms import hub_rows
from megatron_samoe.parsing import JsonObject, parse_yaml, read_text

FOLDER = Path(__file__).parent
#: Fields of a task file before tasks were the harness's.
_EARLIER = {"kind", "layout", "context", "choices", "metrics", "answers"}


@dataclass(frozen=True, kw_only=True)
class LocalData:
    """Where a task's data is below a folder, and in which form; see local_data.yaml."""

    task: str
    files: tuple[str, ...]
    fields: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    labels: str = ""


@cache
def local_data() -> dict[str, LocalData]:
    """Returns where the data of each task is that is read from files in its authors' form."""
    path = FOLDER / "local_data.yaml"
    return {name: typed(LocalData, row, f"{path}: {name}") for name, row in parse_yaml(read_text(path)).items()}


def harness(module: str = "lm_eval.evaluator") -> Any:
    """Returns a module of lm-evaluation-harness, which only reports errors; DataError where it is not installed."""
    found = optional_import(module, "eval", "a task")
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    optional_import("datasets", "eval", "a task").disable_progress_bars()
    return found


@dataclass(frozen=True)
class TaskLoader:
    """Makes the harness's tasks.

    Args:
        data_dir: folder with data of tasks. Relative paths in task files, and data sets of the Hub, are looked for there first.
        hub: what local_data.yaml names and the folder lacks is fetched from the Hub, as it is without a folder.
        include_path: folder with further task files.
    """

    data_dir: Path | None = None
    hub: bool = False
    include_path: str | None = None
    skipped: list[str] = field(default_factory=list)

    def load(self, names: str) -> list[Any]:
        """Returns the tasks and groups that `all`, or names and YAML files between commas, mean.

        Those of `all` and of the harness's tags that have no data in the folder are `skipped`.

        Raises:
            ConfigError: one is not known or named twice.
            DataError: its data or its file is missing or damaged.
        """
        wanted = list(local_data()) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
        if not wanted:
            raise ConfigError("--tasks", names, "names no task")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise NoDataError(f"--data-dir {self.data_dir} is not a folder.{nearest_file(str(self.data_dir))}")
        if names == "all" and self.data_dir is None and not self.hub:
            raise NoDataError("--tasks all needs a folder of data: --data-dir (or MEGATRON_SAMOE_EVAL_DATA), or --hub.")
        found: list[Any] = []
        for name in wanted:
            members = self._members(name)
            for member in members:
                try:
                    found += self._load(member)
                except NoDataError:
                    if names != "all" and len(members) == 1:
                        raise
                    self.skipped.append(member)
        if not found:
            raise NoDataError(
                f"--data-dir {self.data_dir} has the data of no task of {names}; --list-tasks names the files."
            )
        doubled = {name for name in map(name_of, found) if list(map(name_of, found)).count(name) > 1}
        if doubled:
            raise ConfigError("--tasks", names, f"names {', '.join(sorted(doubled))} more than once")
        return found

    def _members(self, name: str) -> list[str]:
        """Returns the tasks of a tag of the harness's, or the name itself."""
        if name in local_data() or _is_file(name):
            return [name]
        known = self._everything.task_index
        if name not in known:
            raise ConfigError(
                "--tasks",
                name,
                f"is neither a task of lm-evaluation-harness nor a .yaml file.{nearest(name, [*local_data(), *known])}",
            )
        return sorted(known[name].tags) if known[name].kind.name == "TAG" else [name]

    @cached_property
    def _everything(self) -> Any:
        return self._all_tasks()

    def _all_tasks(self, *folders: Path, **options: bool) -> Any:
        """Returns a manager of the harness's tasks, whose thousands of files take some seconds to read, and of those in folders."""
        given = [Path(self.include_path)] if self.include_path else []
        return harness("lm_eval.tasks").TaskManager(include_path=[*given, *folders], **options)

    def _load(self, name: str) -> list[Any]:
        """Returns a task, or a group."""
        if _is_file(name):
            path = Path(name).resolve()
            content = read_task_file(path)
            if "group" in content:  # which the harness finds by name only
                try:  # most groups are of tasks in the same folder
                    return self._built(name, content["group"], self._all_tasks(path.parent, include_defaults=False))
                except DataError:
                    return self._built(name, content["group"], self._all_tasks(path.parent))
            return self._built(name, str(path))
        local = local_data().get(name)
        if local is None:
            entry = self._everything.task_index[name]
            if entry.kind.name != "TASK":
                return self._built(name, name, self._everything)
            local = LocalData(task=str(entry.yaml_path), files=(name,))
        data = None
        if self.data_dir is not None:
            try:
                data = find_data(name, local.files, self.data_dir)
            except NoDataError:
                if local.fields and not self.hub:
                    raise
        own = FOLDER / "own_tasks" / local.task
        config = read_task_file(own if own.is_file() else Path(harness("lm_eval.tasks").__file__).parent / local.task)
        if data is not None:
            config |= {"custom_dataset": _reader(name, local, data), "test_split": "test"}
            config |= {"training_split": None, "validation_split": None, "fewshot_split": None}
        return self._built(name, config)

    def _built(self, name: str, spec: str | JsonObject, manager: Any = None) -> list[Any]:
        manager = manager or harness("lm_eval.tasks").TaskManager(include_defaults=False)
        with _naming(name), _in_folder(self.data_dir):
            made = manager.load([spec])
            for task in made["tasks"].values():
                _check_target(task)
            groups = made.get("groups") or {}
            inner = {child for group in groups.values() for child in group.child_names}
            top = [group for group in groups.values() if group.name not in inner]
            return top or list(made["tasks"].values())


def _check_target(task: Any) -> None:
    """Raises DataError where the first item's target is not one of its choices, which the harness would count as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.config.doc_to_choice is None or task.multiple_input:
        return
    doc = task.eval_docs[0]
    target, choices = task.doc_to_target(doc), task.doc_to_choice(doc)
    for one in target if isinstance(target, list) else [target]:
        if not (0 <= one < len(choices) if isinstance(one, int) else one in choices):
            raise DataError(
                f"Task {name_of(task)}: doc_to_target gives {one!r} for the first item, which is none of its choices {choices}."
            )


def name_of(item: Any) -> str:
    """Returns the name of a task or group."""
    return str(getattr(item, "task_name", None) or item.name)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def read_task_file(path: Path) -> JsonObject:
    """Returns what a task file has, with what it includes.

    Raises:
        ConfigError: it is not there.
        DataError: it is not a task of the harness's.
    """
    if not path.is_file() and not path.exists():
        raise ConfigError("--tasks", str(path), "names a task file that is not there")
    with _naming(str(path)):
        read_text(path)  # refuses pipes and devices, which the harness would wait for
        content: JsonObject = harness("lm_eval.tasks._yaml_loader").load_yaml(path)
    if not ({"task", "group"} & content.keys()):
        earlier = " Its fields are those of this package's earlier task files." if _EARLIER & content.keys() else ""
        raise DataError(
            f"{path} is not a task file of lm-evaluation-harness: it has no key 'task'.{earlier} docs/evaluation.md shows one."
        )
    return content


def _reader(name: str, local: LocalData, path: Path) -> Callable[..., JsonObject]:
    """Returns a function that reads a task's data; the harness calls it with options of the task, which are not needed."""

    def read(**options: Any) -> JsonObject:
        rows = list(hub_rows(name, read_rows(path, local.labels), local.fields, local.classes))
        if not rows:
            raise DataError(f"Task {name}: its data holds no row.")
        return {"test": harness("datasets").Dataset.from_list(rows)}

    return read


@contextlib.contextmanager
def _naming(name: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns whatever the harness raises for a task into one sentence with the task's name; faults of the program pass."""
    try:
        yield
    except Exception as error:  # of many kinds: templates, data sets, the network
        if isinstance(error, (MegatronSamoeError, *but)):
            raise
        reason = " ".join(str(error).split())[:400]
        no_data = isinstance(error, (OSError, ConnectionError))
        hint = " --data-dir names a folder that has its data." if no_data and not _is_file(name) else ""
        raise (NoDataError if no_data else DataError)(
            f"Task {name} cannot be used: {type(error).__name__}: {reason.rstrip('.')}.{hint}"
        ) from error


@contextlib.contextmanager
def _in_folder(folder: Path | None) -> Iterator[None]:
    """Lets the data sets library find relative paths, and data sets of the Hub that were copied, in a folder."""
    before = os.getcwd()
    if folder is not None:
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def ask(task: Any, model: Any, limit: int | None = None, num_fewshot: int | None = None) -> JsonObject:
    """Returns what the harness's `evaluate` gives for a task or group, with its samples, on every rank.

    Args:
        num_fewshot: examples before each item; the task's own number if not given.
    """
    loaded = harness("lm_eval.tasks").TaskManager(include_defaults=False).load([task])
    with _naming(name_of(task), but=(RuntimeError, AssertionError, MemoryError)):  # of the model
        for one in loaded["tasks"].values():
            if num_fewshot is not None or one.get_config("num_fewshot") is None:
                one.set_config(key="num_fewshot", value=num_fewshot or 0)
            one.set_fewshot_seed(seed=1234)
        # Standard errors are computed from the samples.
        found: JsonObject = harness().evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    return {**found, "tasks": loaded["tasks"]}
