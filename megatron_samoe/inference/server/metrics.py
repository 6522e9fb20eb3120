"""What the server counts, in Prometheus' text format; prometheus_client is an optional dependency."""

from __future__ import annotations

from megatron_samoe.inference.request import TokenEvent
from megatron_samoe.inference.server.worker import Load

_LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class ServerMetrics:
    """Counters, gauges and histograms of one server; each server has its own registry."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()

        def make(kind, name, text, labels=("model",), **options):  # type: ignore[no-untyped-def]
            return kind(f"megatron_samoe_{name}", text, labels, registry=self.registry, **options)

        self._http = make(Counter, "http_requests", "HTTP requests by route and status", ("route", "status"))
        self.choices = make(Counter, "choices", "Generated answers by how they ended", ("model", "end"))
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of accepted prompts")
        self.generated_tokens = make(Counter, "generated_tokens", "Tokens that the engine made")
        self.running = make(Gauge, "running_choices", "Answers that are being generated")
        self.waiting = make(Gauge, "waiting_choices", "Answers that wait for a place in the batch")
        self.free = make(Gauge, "free_cache_tokens", "Tokens of the key-value cache that nothing has reserved")
        self.first = make(
            Histogram, "time_to_first_token_seconds", "From acceptance to the first token", buckets=_LATENCIES_S
        )
        self.duration = make(
            Histogram, "choice_duration_seconds", "From acceptance to the last token", buckets=_LATENCIES_S
        )
        self.step = make(Histogram, "engine_step_seconds", "Time of an engine step", buckets=_STEPS_S)

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
        self._prompt_tokens = metrics.prompt_tokens.labels(model)
        self._generated_tokens = metrics.generated_tokens.labels(model)
        self._running = metrics.running.labels(model)
        self._waiting = metrics.waiting.labels(model)
        self._free = metrics.free.labels(model)
        self._first = metrics.first.labels(model)
        self._duration = metrics.duration.labels(model)
        self._step = metrics.step.labels(model)

    def count_prompt(self, num_tokens: int) -> None:
        """Counts the prompts of an accepted request."""
        self._prompt_tokens.inc(num_tokens)

    def count_token(self, event: TokenEvent, age_s: float, is_first: bool) -> None:
        """Counts a token, so long after its request was accepted."""
        self._generated_tokens.inc()
        if is_first:
            self._first.observe(age_s)
        if event.finish_reason is not None:
            self._duration.observe(age_s)
            self.count_end(event.finish_reason)

    def count_end(self, end: str) -> None:
        """Counts an answer that has ended: stop, length, cancelled, refused or failed."""
        self._choices.labels(self._model, end).inc()

    def set_load(self, load: Load) -> None:
        """Takes over how busy the engine is."""
        self._running.set(load.num_running)
        self._waiting.set(load.num_waiting)
        self._free.set(load.num_free_tokens)
        if load.step_time_s > 0:
            self._step.observe(load.step_time_s)
