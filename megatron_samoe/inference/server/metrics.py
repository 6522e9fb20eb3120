"""The server's counters, in Prometheus' text format; prometheus_client is an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_samoe.inference.request import TokenEvent
from megatron_samoe.inference.server.worker import Load

_LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


#: Name, kind, what is counted, and buckets, of one model each.
_OF_MODELS: tuple[tuple[str, str, str, Sequence[float] | None], ...] = (
    ("prompt_tokens", "Counter", "Tokens of accepted prompts", None),
    ("generated_tokens", "Counter", "Tokens that the engine made", None),
    ("running_choices", "Gauge", "Answers that are being generated", None),
    ("waiting_choices", "Gauge", "Answers that wait for a slot of the batch", None),
    ("free_cache_tokens", "Gauge", "Tokens of the key-value cache that nothing has reserved", None),
    ("time_to_first_token_seconds", "Histogram", "From acceptance to the first token", _LATENCIES_S),
    ("choice_duration_seconds", "Histogram", "From acceptance to the last token", _LATENCIES_S),
    ("engine_step_seconds", "Histogram", "Time of an engine step", _STEPS_S),
)


class ServerMetrics:
    """Counters, gauges and histograms of one server; each server has its own registry."""

    def __init__(self) -> None:
        import prometheus_client

        self.registry = prometheus_client.CollectorRegistry()

        def make(name: str, kind: str, text: str, buckets: Sequence[float] | None, labels: Sequence[str]) -> Any:
            options = {} if buckets is None else {"buckets": buckets}
            make_one = getattr(prometheus_client, kind)
            return make_one(f"megatron_samoe_{name}", text, labels, registry=self.registry, **options)

        self.of_models = {row[0]: make(*row, ("model",)) for row in _OF_MODELS}
        self.choices = make("choices", "Counter", "Generated answers by how they ended", None, ("model", "end"))
        status = ("route", "status")
        self._http = make("http_requests", "Counter", "HTTP requests by route and status", None, status)

    def count_http(self, route: str, status: int) -> None:
        """Counts an answered HTTP request; a route is a path that exists, or "other"."""
        self._http.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class ModelMetrics:
    """Counts for one model of a server."""

    def __init__(self, metrics: ServerMetrics, model: str):
        self._choices, self._model = metrics.choices, model
        self._of = {name: metric.labels(model) for name, metric in metrics.of_models.items()}

    def count_prompt(self, num_tokens: int) -> None:
        """Counts the prompts of an accepted request."""
        self._of["prompt_tokens"].inc(num_tokens)

    def count_token(self, event: TokenEvent, age_s: float, is_first: bool) -> None:
        """Counts a token, so long after its request was accepted."""
        self._of["generated_tokens"].inc()
        if is_first:
            self._of["time_to_first_token_seconds"].observe(age_s)
        if event.finish_reason is not None:
            self._of["choice_duration_seconds"].observe(age_s)
            self.count_end(event.finish_reason)

    def count_end(self, end: str) -> None:
        """Counts an answer that has ended: stop, length, cancelled, refused or failed."""
        self._choices.labels(self._model, end).inc()

    def set_load(self, load: Load) -> None:
        """Takes over how busy the engine is."""
        self._of["running_choices"].set(load.num_running)
        self._of["waiting_choices"].set(load.num_waiting)
        self._of["free_cache_tokens"].set(load.num_free_tokens)
        if load.step_time_s > 0:
            self._of["engine_step_seconds"].observe(load.step_time_s)
