"""Tasks and perplexity: `megatron-samoe evaluate --load runs/x/checkpoints --data-dir DIR --tasks piqa,boolq`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from megatron_samoe.cli.model_arguments import ModelOptions, rank_program
from megatron_samoe.cli.program import Count
from megatron_samoe.convert.opener import format_of
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.store import LoadWords
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.zero_shot import tables
from megatron_samoe.evaluation.zero_shot.data_files import Document, read_documents
from megatron_samoe.evaluation.zero_shot.harness_model import harness_model
from megatron_samoe.evaluation.zero_shot.predictors import ModelPredictor
from megatron_samoe.evaluation.zero_shot.results import TaskResult, evaluate_corpus, evaluate_task, result_record
from megatron_samoe.evaluation.zero_shot.tasks import TaskLoader, harness, local_data, name_of
from megatron_samoe.evaluation.zero_shot.variation import choose_iterations, compare, variations
from megatron_samoe.log import logger
from megatron_samoe.parallel_state import ParallelState, launcher
from megatron_samoe.parsing import JsonObject, without_infinities

#: Environment variable for --data-dir.
DATA_VARIABLE = "MEGATRON_SAMOE_EVAL_DATA"


#: Tasks and groups of the harness, and texts by their name.
Questions = tuple[Sequence[Any], Mapping[str, Sequence[Document]]]


@dataclass(frozen=True)
class Run:
    """One evaluated checkpoint."""

    name: str
    results: Sequence[TaskResult]
    seq_length: int
    folder: str


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelOptions):
    """Tasks of lm-evaluation-harness, and perplexity.

    Under torchrun the model is spread over the ranks; the checkpoint may have been saved by any other layout, and no layout
    changes the results. docs/evaluation.md has the tasks, the files they are read from, and what the figures mean.
    """

    FORMER: ClassVar[Mapping[str, str]] = {
        "--harness": "leave it out: every task is lm-evaluation-harness's",
        "--predictor": "has gone: the column `best constant` has what a constant answer gets",
    }

    tasks: str = "all"
    """names and .yaml files between commas; all: every one of --list-tasks that has data"""
    list_tasks: bool = False
    """show the tasks that --data-dir is searched for, and leave"""
    data_dir: Path | None = None
    """folder of the tasks' data; MEGATRON_SAMOE_EVAL_DATA if not given"""
    hub: bool = False
    """fetch data that is not in --data-dir from the Hugging Face Hub"""
    include_path: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """further task files"""
    num_fewshot: int | None = None
    """examples before each item; the task's own number if not given"""
    corpus: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = ()
    """texts whose perplexity is measured: .txt, or rows with a field "text\""""
    limit: Count = None
    """only the first N items of each task"""
    load: str = ""
    """folder of a run, of checkpoints saved by any layout, or of another program's model"""
    checkpoints: Annotated[str | None, tyro.conf.arg(metavar="LAST:N")] = None
    """mean, sd and range over the last N, or over a list such as 800,900"""
    compare_with: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """another folder, for paired tests on the same items"""
    batch_size: Count = None
    """sequences of a forward pass; 4,096 tokens' worth if not given"""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """results as JSON"""
    samples: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """one .jsonl per task with every item and answer"""

    def run(self) -> None:
        if self.list_tasks:
            for name, local in local_data().items():
                logger.info(f"{name:16} {', '.join(local.files)}")
            logger.info(
                "Every other task of lm-evaluation-harness goes by its name, too: `lm_eval ls tasks` lists them."
            )
            return
        _evaluate(_checked(self))


def _checked(options: Evaluate) -> Evaluate:
    """Returns the options with the folders of checkpoints; ConfigError for those that do not go together."""
    if not options.load:
        raise ConfigError("--load", None, "must name a folder of checkpoints")
    if options.checkpoints and options.ckpt_step is not None:
        raise ConfigError("--ckpt-step", options.ckpt_step, "excludes --checkpoints")
    for name, value in (("--batch-size", options.batch_size), ("--limit", options.limit)):
        if value is not None and value < 1:
            raise ConfigError(name, value, "must be 1 or more")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ConfigError("--num-fewshot", options.num_fewshot, "must be 0 or more")
    load, other = (
        store.checkpoints_of(folder) if folder else folder for folder in (options.load, options.compare_with)
    )
    options = replace(options, load=load or "", compare_with=other)
    if options.compare_with:
        format_of(options.compare_with, LoadWords("--compare-with "))  # its turn comes last
    _check_outputs(options)
    return options


def _check_outputs(options: Evaluate) -> None:
    """Raises ConfigError where results could not be written, before hours are spent on them."""
    for name, path in (("--json", options.json), ("--samples", options.samples)):
        if path is None:
            continue
        folder = path if name == "--samples" else path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(name, str(path), f"cannot be written: {error.strerror or error}") from None
        if (name == "--json" and path.is_dir()) or not os.access(folder, os.W_OK):
            raise ConfigError(name, str(path), "cannot be written: it is a folder, or in one that is write-protected")


def _evaluate(options: Evaluate) -> None:
    named = os.environ.get(DATA_VARIABLE)
    data_dir = options.data_dir or (Path(named) if named else None)
    tasks: list[Any] = []
    if options.tasks != "all" or data_dir is not None or not options.corpus:
        loader = TaskLoader(data_dir, options.hub, options.include_path)
        tasks = loader.load(options.tasks)
        if loader.skipped:
            logger.info(f"no data, left out: {', '.join(loader.skipped)}")
    corpora = {f"corpus:{path.name}": read_documents(path, options.limit) for path in options.corpus}
    runs, other = _ask_models(options, (tasks, corpora))
    if launcher.rank() == 0:
        _show(runs, other)
        _write(options, runs, other)


def _ask_models(options: Evaluate, questions: Questions) -> tuple[list[Run], list[Run]]:
    """Returns the runs of --load and that of --compare-with; what is there is written after each, lest it be lost."""
    parallel = options.join()
    steps: Sequence[int | None] = [options.ckpt_step]
    if options.checkpoints is not None:
        steps = choose_iterations(options.checkpoints, store.whole_iterations(options.load), options.load)
    asked = [(options.load, step) for step in steps]
    asked += [(options.compare_with, None)] if options.compare_with else []
    found: list[Run] = []
    for folder, step in asked:
        found.append(_ask_model(options, parallel, folder, step, questions))
        for result in found[-1].results if len(found) < len(steps) else ():  # the last one's are in the table
            logger.info(f"  {result.task}: {tables.metric_line(result)}")
        if launcher.rank() == 0 and len(found) < len(asked):
            _write(options, found, [], is_partial=True)
    own = len(asked) - bool(options.compare_with)
    return found[:own], found[own:]


def _ask_model(options: Evaluate, parallel: ParallelState, folder: str, step: int | None, questions: Questions) -> Run:
    tasks, corpora = questions
    loaded = options.loaded(parallel, folder, step)
    logger.info(f"{loaded.directory}: {', '.join([*map(name_of, tasks), *corpora])}")
    model = harness_model(loaded, options.batch_size, _bar) if tasks else None
    results: list[TaskResult] = []
    for task in tasks:
        with contextlib.redirect_stderr(io.StringIO()):  # where the harness draws a bar for each step of its own
            results += evaluate_task(task, model, options.limit, options.num_fewshot)
    predictor = ModelPredictor(loaded, options.batch_size, _bar)
    results += [evaluate_corpus(name, documents, predictor) for name, documents in corpora.items()]
    return Run(loaded.directory.name, results, loaded.config.model.seq_length, str(loaded.directory))


@contextlib.contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar on the first rank's terminal."""
    from tqdm import tqdm

    terminal = sys.__stderr__
    hidden = launcher.rank() != 0 or terminal is None or not terminal.isatty()
    with tqdm(total=total, desc=name, disable=hidden, leave=False, file=terminal) as bar:
        yield bar.update


def _show(runs: Sequence[Run], other: Sequence[Run]) -> None:
    last = runs[-1]
    logger.info(f"\n{last.folder}\n{tables.result_table(last.results)}")
    for note in tables.notes(last.results, last.seq_length):
        logger.info(note)
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs)
        logger.info(
            f"\nover {len(runs)} checkpoints ({names})\n{tables.variation_table(variations([r.results for r in runs]))}"
        )
    for second in other:
        comparisons = compare(last.results, second.results)
        logger.info(f"\nfirst {last.folder}\nsecond {second.folder}\n{tables.comparison_table(comparisons)}")


def _write(options: Evaluate, runs: Sequence[Run], other: Sequence[Run], is_partial: bool = False) -> None:
    """Writes --json and --samples; `is_partial`: others are to follow."""
    everyone = [*runs, *other]
    if options.json:
        content: JsonObject = {
            "runs": [
                {
                    "name": run.name,
                    "checkpoint": run.folder,
                    "seq_length": run.seq_length,
                    "limit": options.limit,
                    "results": [result_record(result) for result in run.results],
                }
                for run in everyone
            ]
        }
        if len(runs) > 1:
            content["variation"] = [asdict(v) for v in variations([run.results for run in runs])]
        for second in other:
            content["comparison"] = [asdict(c) for c in compare(runs[-1].results, second.results)]
        _write_text(options.json, json.dumps(without_infinities(content), indent=1) + "\n")
    if not options.samples:
        return
    for number, run in enumerate(everyone):
        is_alone = len(everyone) == 1 and not is_partial
        folder = options.samples if is_alone else options.samples / f"{number}_{run.name}"
        for result in run.results:
            if result.samples:
                plain = harness("lm_eval.utils").handle_non_serializable
                lines = [
                    json.dumps(without_infinities(record), ensure_ascii=False, default=plain)
                    for record in result.samples
                ]
                _write_text(folder / f"{result.task}.jsonl", "\n".join(lines) + "\n")


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError("--json/--samples", str(path), f"cannot be written: {error.strerror or error}") from None


main = rank_program(Evaluate)

if __name__ == "__main__":
    sys.exit(main())
