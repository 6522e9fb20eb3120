"""A task's results: every metric with its standard error, and what a reader must know beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_samoe.evaluation.zero_shot.items import Document, Item, Response
from megatron_samoe.evaluation.zero_shot.metrics import CORPUS_METRICS, METRICS, Metric, is_right, prediction
from megatron_samoe.evaluation.zero_shot.predictors import ModelPredictor, Predictor
from megatron_samoe.evaluation.zero_shot.statistics import binomial_stderr, bootstrap_stderr
from megatron_samoe.evaluation.zero_shot.task import Task
from megatron_samoe.parsing import JsonObject, without_infinities


@dataclass(frozen=True)
class MetricResult:
    """One metric of one task.

    Attributes:
        value: as it is computed, shares from 0 to 1.
        stderr: binomial for shares of units, by bootstrap over units for the rest; nan where there is one unit.
        x_UV: what the value is computed from, one row per unit.
    """

    metric: Metric
    value: float
    stderr: float
    x_UV: np.ndarray


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        best_constant: share of items that the best single choice would get right; nan without choices.
        num_cut: items whose context was cut from the left.
        num_windowed: items with a continuation longer than the model's sequence.
    """

    task: str
    items: Sequence[Item]
    responses: Sequence[Response]
    metrics: Mapping[str, MetricResult]
    best_constant: float = math.nan
    num_cut: int = 0
    num_windowed: int = 0
    num_documents: int = 0

    @property
    def num_items(self) -> int:
        """Items, or documents of a corpus."""
        return len(self.items) or self.num_documents


def measure(metric: Metric, x_UV: np.ndarray) -> MetricResult:
    """Returns a metric's value and standard error."""
    with np.errstate(invalid="ignore"):  # a constant predictor's log-likelihoods are infinite
        value = float(metric.finish(x_UV.sum(0)))
        if metric.binary:
            stderr = binomial_stderr(value, x_UV.shape[0])
        else:
            stderr = bootstrap_stderr(x_UV, metric.finish) if np.isfinite(x_UV).all() else math.nan
    return MetricResult(metric, value, stderr, x_UV)


def evaluate_task(task: Task, items: Sequence[Item], predictor: Predictor) -> TaskResult:
    """Returns a predictor's results on a task's items."""
    responses = predictor.respond(task, items)
    metrics = {name: measure(METRICS[name], METRICS[name].units(items, responses)) for name in task.metrics}
    golds = Counter(item.gold for item in items)
    ranked = task.kind in ("multiple_choice", "partial")
    return TaskResult(
        task.name,
        items,
        responses,
        metrics,
        best_constant=max(golds.values()) / len(items) if ranked else math.nan,
        num_cut=sum(response.cut_tokens > 0 for response in responses),
        num_windowed=sum(response.in_windows for response in responses),
    )


def evaluate_corpus(name: str, documents: Sequence[Document], predictor: ModelPredictor) -> TaskResult:
    """Returns a model's perplexity on whole texts, per token, byte and word."""
    scores = predictor.loglikelihood_of(documents)
    x_UV = np.array(
        [(ll, n, d.num_bytes, d.num_words) for (ll, n), d in zip(scores, documents, strict=True)], dtype=np.float64
    )
    metrics = {metric: measure(CORPUS_METRICS[metric], x_UV) for metric in CORPUS_METRICS}
    return TaskResult(name, (), (), metrics, num_documents=len(documents))


def result_record(result: TaskResult) -> JsonObject:
    """Returns a result as plain values for JSON; what is not finite becomes None."""
    metrics = {name: {"value": m.value, "stderr": m.stderr, "units": len(m.x_UV)} for name, m in result.metrics.items()}
    record = {
        "task": result.task,
        "items": result.num_items,
        "contexts_cut": result.num_cut,
        "continuations_in_windows": result.num_windowed,
        "best_constant": result.best_constant,
        "metrics": metrics,
    }
    return without_infinities(record)


def sample_records(result: TaskResult) -> list[JsonObject]:
    """Returns one record per item: what was asked, what was answered, whether that is right."""
    return [_sample(result.task, *pair) for pair in zip(result.items, result.responses, strict=True)]


def _sample(task: str, item: Item, response: Response) -> JsonObject:
    record: JsonObject = {"task": task, "item": item.name}
    record |= {"group": item.group} if item.group else {}
    record |= {"contexts": item.contexts, "right": bool(is_right(item, response))}
    if item.answers:
        record |= {"answers": item.answers, "text": response.text}
    else:
        record |= {
            "continuations": item.continuations,
            "loglikelihoods": response.loglikelihoods,
            "is_greedy": response.is_greedy,
        }
        record |= {"gold": item.gold, "prediction": prediction(item, response)} if len(item.pairs) > 1 else {}
    record |= {"cut_tokens": response.cut_tokens} if response.cut_tokens else {}
    return without_infinities(record)
