"""What a run of the evaluation asks: tasks with their items, and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.evaluation.zero_shot.build_items import load_items
from megatron_samoe.evaluation.zero_shot.data_files import NoDataError, read_documents
from megatron_samoe.evaluation.zero_shot.items import Document, Item
from megatron_samoe.evaluation.zero_shot.predictors import ModelPredictor, Predictor
from megatron_samoe.evaluation.zero_shot.results import TaskResult, evaluate_corpus, evaluate_task
from megatron_samoe.evaluation.zero_shot.task import Task, load_task, task_names


@dataclass(frozen=True)
class Questions:
    """All that is asked.

    Attributes:
        skipped: tasks of `all` whose data is not there.
        failed: what is wrong with tasks that cannot be asked, a message each.
    """

    tasks: tuple[tuple[Task, Sequence[Item]], ...]
    corpora: tuple[tuple[str, Sequence[Document]], ...] = ()
    skipped: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def prepare(
    names: str, data_dir: Path | None, corpora: Sequence[Path] = (), limit: int | None = None, hub: bool = False
) -> Questions:
    """Returns the items of tasks named by `all` or by names and .yaml files between commas, and texts to measure.

    Raises:
        ConfigError: a task is not known, or named twice.
        DataError: no task can be asked: their data or files are damaged, or not there.
    """
    if limit is not None and limit < 1:
        raise ConfigError("--limit", limit, "must be 1 or more")
    everything = names == "all"
    if everything and data_dir is None and not hub:
        raise NoDataError("--tasks all needs a folder of data: --data-dir (or MEGATRON_SAMOE_EVAL_DATA), or --hub.")
    wanted = task_names() if everything else [name.strip() for name in names.split(",") if name.strip()]
    tasks: list[Task] = []
    failed: list[DataError] = []
    for name in wanted:
        try:
            tasks.append(load_task(name))
        except DataError as error:
            failed.append(error)
    doubled = {task.name for task in tasks if sum(other.name == task.name for other in tasks) > 1}
    if doubled:
        raise ConfigError("--tasks", names, f"names {', '.join(sorted(doubled))} more than once")
    found: list[tuple[Task, Sequence[Item]]] = []
    skipped = []
    for task in tasks:
        try:
            found.append((task, load_items(task, data_dir, limit, hub)))
        except NoDataError:
            if not everything or data_dir is None or not data_dir.is_dir():
                raise  # it was asked for by name
            skipped.append(task.name)
        except DataError as error:
            failed.append(error)
    texts = tuple((f"corpus:{path.name}", read_documents(path, limit)) for path in corpora)
    if not found and not texts:
        if not wanted:
            raise ConfigError("--tasks", names, "names no task")
        raise (
            failed[0]
            if failed
            else NoDataError(f"--data-dir {data_dir} has the data of no task; docs/evaluation.md lists the names.")
        )
    return Questions(tuple(found), texts, tuple(skipped), tuple(map(str, failed)))


@contextmanager
def _named(task: Task) -> Iterator[None]:
    """Puts the task's name before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"Task {task.name}: {error}.") from error


def ask(questions: Questions, predictor: Predictor, tell: Callable[[TaskResult], object]) -> list[TaskResult]:
    """Returns a predictor's results on everything; `tell` hears each as it is there."""
    if isinstance(predictor, ModelPredictor):  # what cannot be answered is said before hours are spent on the rest
        for task, _ in questions.tasks:
            with _named(task):
                predictor.check(task)
    elif questions.corpora:
        name = questions.corpora[0][0].removeprefix("corpus:")
        raise ConfigError("--corpus", name, "needs a model: a constant predictor gives no probabilities")
    results = []
    for task, items in questions.tasks:
        with _named(task):
            results.append(evaluate_task(task, items, predictor))
        tell(results[-1])
    for name, documents in questions.corpora:
        assert isinstance(predictor, ModelPredictor)
        results.append(evaluate_corpus(name, documents, predictor))
        tell(results[-1])
    return results
