"""Zero-shot tasks and perplexity: `megatron-samoe evaluate --load runs/x/checkpoints --data-dir DIR --tasks piqa,boolq`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from megatron_samoe.cli.model_arguments import LayoutOptions, ModelOptions, rank_program
from megatron_samoe.cli.program import Count
from megatron_samoe.config.option import flag
from megatron_samoe.convert.opener import format_of
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.store import LoadWords
from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.evaluation.zero_shot import tables
from megatron_samoe.evaluation.zero_shot.lm_eval_adapter import run_harness
from megatron_samoe.evaluation.zero_shot.predictors import CONSTANT, ConstantPredictor, ModelPredictor
from megatron_samoe.evaluation.zero_shot.prepare import Questions, ask, prepare
from megatron_samoe.evaluation.zero_shot.results import TaskResult, result_record, sample_records
from megatron_samoe.evaluation.zero_shot.task import load_task, task_names
from megatron_samoe.evaluation.zero_shot.variation import (
    choose_iterations,
    compare,
    comparison_record,
    variation_record,
    variations,
)
from megatron_samoe.log import logger
from megatron_samoe.parallel_state import ParallelState, launcher
from megatron_samoe.parsing import JsonObject

#: Environment variable that stands in for --data-dir.
DATA_VARIABLE = "MEGATRON_SAMOE_EVAL_DATA"


_WHO = f"who answers: model, or without one {', '.join(CONSTANT)}"


@dataclass(frozen=True)
class Run:
    """One evaluated checkpoint, or predictor.

    Attributes:
        folder: of the checkpoint; empty for a predictor.
    """

    name: str
    results: Sequence[TaskResult]
    seq_length: int | None = None
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelOptions):
    """Zero-shot tasks and perplexity.

    Under torchrun the model is spread over the ranks; the checkpoint may have been saved by any other layout, and no layout
    changes the results. docs/evaluation.md has the tasks, the files they are read from, and what the figures mean.
    """

    tasks: str = "all"
    """names and .yaml files between commas; all: every one that has data"""
    list_tasks: bool = False
    """show the tasks and leave"""
    data_dir: Path | None = None
    """folder of the tasks' data; MEGATRON_SAMOE_EVAL_DATA if not given"""
    hub: bool = False
    """fetch data that is not in --data-dir from the Hugging Face Hub"""
    corpus: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = ()
    """texts whose perplexity is measured: .txt, or rows with a field "text\""""
    limit: Count = None
    """only the first N items of each task"""
    predictor: Annotated[str, tyro.conf.arg(help=_WHO)] = "model"
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
    harness: bool = False
    """run lm-evaluation-harness's tasks of these names in place of ours (extra eval)"""
    include_path: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """further task files in the harness's format"""

    def run(self) -> None:
        """Evaluates."""
        if self.list_tasks:
            for name in task_names():
                logger.info(f"{name:14} {load_task(name).description}")
            return
        _evaluate(_checked(self))


def _checked(options: Evaluate) -> Evaluate:
    """Returns the options with the folders of checkpoints; ConfigError for those that do not go together."""
    constant = options.predictor != "model"
    if constant:
        ConstantPredictor(options.predictor)
        of_models = (
            "load",
            "ckpt_step",
            "checkpoints",
            "compare_with",
            "batch_size",
            "tokenizer_model",
            "harness",
            *(f.name for f in fields(LayoutOptions) if getattr(options, f.name) != 1),
        )
        _refuse(options, of_models, f"has no effect with --predictor {options.predictor}")
    if not constant and not options.load:
        raise ConfigError(
            "--load", None, f"must name a folder of checkpoints, or give --predictor {'|'.join(CONSTANT)}"
        )
    if options.checkpoints and options.ckpt_step is not None:
        raise ConfigError("--ckpt-step", options.ckpt_step, "excludes --checkpoints")
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError("--batch-size", options.batch_size, "must be 1 or more")
    if options.harness:
        if options.tasks == "all":
            raise ConfigError("--tasks", "all", "with --harness must name tasks of the harness")
        ours = ("data_dir", "hub", "corpus", "checkpoints", "compare_with", "samples")
        _refuse(options, ours, "has no effect with --harness")
    elif options.include_path:
        raise ConfigError("--include-path", options.include_path, "needs --harness")
    load, other = (
        store.checkpoints_of(folder) if folder else folder for folder in (options.load, options.compare_with)
    )
    options = replace(options, load=load or "", compare_with=other)
    if options.compare_with:
        format_of(options.compare_with, LoadWords("--compare-with "))  # its turn comes last
    _check_outputs(options)
    return options


def _refuse(options: Evaluate, names: Sequence[str], why: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value not in (None, False, (), ""):
            raise ConfigError(flag(name), str(value) if isinstance(value, Path) else value, why)


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
    if options.harness:
        _run_harness(options)
        return
    named = os.environ.get(DATA_VARIABLE)
    data_dir = options.data_dir or (Path(named) if named else None)
    wants_tasks = options.tasks != "all" or data_dir is not None or not options.corpus
    questions = prepare(options.tasks if wants_tasks else "", data_dir, options.corpus, options.limit, options.hub)
    if questions.skipped:
        logger.info(f"no data, left out: {', '.join(questions.skipped)}")
    for problem in questions.failed:
        logger.info(f"left out: {problem}")
    if options.predictor != "model":
        runs = [Run(options.predictor, ask(questions, ConstantPredictor(options.predictor), _tell))]
        other: list[Run] = []
    else:
        runs, other = _ask_models(options, questions)
    if launcher.rank() == 0:
        _show(runs, other)
        _write(options, runs, other)
    if questions.failed:
        raise DataError(f"these tasks were not asked: {' '.join(questions.failed)}", collective=True)


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
        if launcher.rank() == 0 and len(found) < len(asked):
            _write(options, found, [], is_partial=True)
    own = len(asked) - bool(options.compare_with)
    return found[:own], found[own:]


def _ask_model(options: Evaluate, parallel: ParallelState, folder: str, step: int | None, questions: Questions) -> Run:
    loaded = options.loaded(parallel, folder, step)
    logger.info(f"{loaded.directory}")
    predictor = ModelPredictor(loaded, options.batch_size, _bar)
    return Run(
        loaded.directory.name, ask(questions, predictor, _tell), loaded.config.model.seq_length, str(loaded.directory)
    )


def _tell(result: TaskResult) -> None:
    logger.info(f"  {result.task}: {tables.metric_line(result)}")


@contextlib.contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar on the first rank's terminal."""
    from tqdm import tqdm

    hidden = launcher.rank() != 0 or not sys.stderr.isatty()
    with tqdm(total=total, desc=name, disable=hidden, leave=False) as bar:
        yield bar.update


def _show(runs: Sequence[Run], other: Sequence[Run]) -> None:
    last = runs[-1]
    logger.info(f"\n{last.folder or last.name}\n{tables.result_table(last.results)}")
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
            content["variation"] = [variation_record(v) for v in variations([run.results for run in runs])]
        for second in other:
            content["comparison"] = [comparison_record(c) for c in compare(runs[-1].results, second.results)]
        _write_text(options.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
    if not options.samples:
        return
    for number, run in enumerate(everyone):
        is_alone = len(everyone) == 1 and not is_partial
        folder = options.samples if is_alone else options.samples / f"{number}_{run.name}"
        for result in run.results:
            if result.items:
                lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in sample_records(result)]
                _write_text(folder / f"{result.task}.jsonl", "\n".join(lines) + "\n")


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError("--json/--samples", str(path), f"cannot be written: {error.strerror or error}") from None


def _run_harness(options: Evaluate) -> None:
    found = run_harness(
        options.loaded(options.join()),
        [name.strip() for name in options.tasks.split(",")],
        batch_size=options.batch_size,
        limit=options.limit,
        include_path=options.include_path,
    )
    if launcher.rank() == 0:
        results = found["results"]
        for task, metrics in results.items():
            for name, value in metrics.items():
                if isinstance(value, float):
                    logger.info(f"{task:24} {name.removesuffix(',none'):20} {value:.6g}")
        if options.json:
            _write_text(options.json, json.dumps(results, indent=1, default=str) + "\n")


main = rank_program(Evaluate)

if __name__ == "__main__":
    sys.exit(main())
