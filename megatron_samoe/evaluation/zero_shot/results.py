"""A task's results: every metric with its standard error, and notes for a reader."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from megatron_samoe.evaluation.zero_shot.data_files import Document
from megatron_samoe.evaluation.zero_shot.metrics import MetricResult, means, of_questions, of_texts, perplexity, ratio
from megatron_samoe.evaluation.zero_shot.predictors import ModelPredictor
from megatron_samoe.evaluation.zero_shot.statistics import Finish
from megatron_samoe.evaluation.zero_shot.tasks import ask, harness
from megatron_samoe.parsing import JsonObject, without_infinities


@dataclass(frozen=True)
class TaskResult:
    """One task, a group of tasks, or texts.

    Attributes:
        num_items: items, or texts.
        samples: the harness's record of each item.
        best_constant: share of items that the best single choice would get right; nan without choices.
        num_cut: items whose context was cut from the left.
        num_windowed: items with a continuation longer than the model's sequence.
    """

    task: str
    num_items: int
    metrics: Mapping[str, MetricResult]
    samples: Sequence[JsonObject] = field(default=(), repr=False)
    best_constant: float = math.nan
    num_cut: int = 0
    num_windowed: int = 0


def evaluate_task(task: Any, model: Any, limit: int | None = None, num_fewshot: int | None = None) -> list[TaskResult]:
    """Returns a model's results on a task, or on a group and its tasks; all ranks of the layout call it together.

    Args:
        task, model: of `TaskLoader` and `harness_model`.
        limit: only the first items of each.
        num_fewshot: examples before each item; the task's own number if not given.
    """
    model.cut.clear()
    model.windowed.clear()
    found = ask(task, model, limit, num_fewshot)
    results = [
        _of_task(one, found["samples"][name], found["results"][name], model) for name, one in found["tasks"].items()
    ]
    sizes = {result.task: result.num_items for result in results}
    for name in found.get("groups", {}):
        size = sum(sizes[child] for child in found["group_subtasks"].get(name, ()) if child in sizes)
        values = {
            _shown_name(key): MetricResult(v, in_percent=0 <= v <= 1) for key, v in _values(found["results"][name])
        }
        results.append(TaskResult(name, size, values))
    return results


def _values(results: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns the figures of the harness's results, which it names by metric and filter, without standard errors."""
    return [
        (key, float(value))
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, Real)
    ]


def _shown_name(key: str) -> str:
    name, _, filter_name = key.partition(",")
    return name if filter_name == "none" else f"{name} ({filter_name})"


def _of_task(task: Any, samples: Sequence[JsonObject], values: Mapping[str, Any], model: Any) -> TaskResult:
    name = task.task_name
    ids = {sample["doc_id"] for sample in samples}
    metrics = {_shown_name(key): _metric(task, samples, key, value) for key, value in _values(values)}
    golds = [_gold(task, sample) for sample in samples]
    ranked = task.OUTPUT_TYPE == "multiple_choice" and all(isinstance(gold, int) for gold in golds)
    questions = (task.config.metadata or {}).get("whole_questions")
    if questions:
        said = [int(np.argmax([resp[0] for resp in sample["filtered_resps"]])) == 1 for sample in samples]
        fill = harness("lm_eval.utils").apply_template
        metrics = of_questions(
            said, [gold == 1 for gold in golds], [fill(questions, sample["doc"]) for sample in samples]
        )
    return TaskResult(
        name,
        len(ids),
        metrics,
        samples,
        best_constant=max(Counter(golds).values()) / len(golds) if ranked else math.nan,
        num_cut=len(ids & model.cut[name]),
        num_windowed=len(ids & model.windowed[name]),
    )


def _gold(task: Any, sample: JsonObject) -> Any:
    """Returns the index of the right choice; the target where it is not one."""
    # Where contexts are ranked, the harness has the index in the text's stead.
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    if isinstance(gold, str) and task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(sample["doc"])
        return choices.index(gold) if gold in choices else gold
    return int(gold) if isinstance(gold, bool) else gold


def _metric(task: Any, samples: Sequence[JsonObject], key: str, value: float) -> MetricResult:
    """Returns a metric with its standard error where it is a function of the mean over items."""
    name, _, filter_name = key.partition(",")
    numbers = [sample[name] for sample in samples if sample["filter"] == filter_name and name in sample]
    known = harness("lm_eval.api.metrics")
    finishes: dict[Any, Finish] = {known.mean: ratio, known.perplexity: perplexity}
    finish = finishes.get(task.aggregation().get(name))
    if finish is None or not numbers or not all(isinstance(number, Real) for number in numbers):
        return MetricResult(value, in_percent=name == "f1")
    return means([float(number) for number in numbers], finish)


def evaluate_corpus(name: str, documents: Sequence[Document], predictor: ModelPredictor) -> TaskResult:
    """Returns a model's perplexity on texts, per token, byte and word.

    Bytes (UTF-8) and words are those of the texts before any tokenizer. Words are separated by runs of white space,
    counted as lm-evaluation-harness does: an empty part at an end counts.
    """
    scores = predictor.loglikelihood_of(documents)
    rows = [
        (loglikelihood, num_tokens, len(document.text.encode()), len(re.split(r"\s+", document.text)))
        for (loglikelihood, num_tokens), document in zip(scores, documents, strict=True)
    ]
    return TaskResult(name, len(documents), of_texts(np.array(rows, dtype=np.float64)))


def result_record(result: TaskResult) -> JsonObject:
    """Returns a result as plain values for JSON; what is not finite becomes None."""
    metrics = {
        name: {"value": m.value, "stderr": m.stderr, "units": len(m.x_UV), "in_percent": m.in_percent}
        for name, m in result.metrics.items()
    }
    record = {
        "task": result.task,
        "items": result.num_items,
        "contexts_cut": result.num_cut,
        "continuations_in_windows": result.num_windowed,
        "best_constant": result.best_constant,
        "metrics": metrics,
    }
    return without_infinities(record)
