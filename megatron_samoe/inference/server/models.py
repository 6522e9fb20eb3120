"""The models of one server: each has an engine with a thread of its own, and all begin and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_samoe.errors import ConfigError, shown
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.server.jobs import CompletionService, draining_error, failed_error
from megatron_samoe.inference.server.metrics import ModelMetrics, ServerMetrics
from megatron_samoe.inference.server.protocol import ApiError, ModelFacts
from megatron_samoe.inference.server.worker import ThreadShares
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.parallel_state.state import Group


@dataclass(frozen=True)
class NamedModel:
    """A model that a server is given.

    Attributes:
        name: as clients name it.
        shown: the model as it was trained, for clients that ask which experts a text uses; None shows none.
    """

    name: str
    engine: Engine
    shown: RankModel | None = None


@dataclass(frozen=True)
class ServedModel:
    """A model as requests use it.

    Attributes:
        showing: held while `shown` runs: one text at a time.
    """

    facts: ModelFacts
    service: CompletionService
    shown: RankModel | None
    showing: asyncio.Lock = field(default_factory=asyncio.Lock)


def asked_model(body: Mapping[str, Any], names: Sequence[str]) -> str:
    """Returns the model that a request asks for: of those served the first, where it names none.

    Raises:
        ApiError: it names another.
    """
    model = names[0] if body.get("model") is None else body["model"]
    if model not in names:
        raise ApiError(
            404,
            f"The model {shown(model)} is not served here; this server has {', '.join(map(repr, names))}.",
            param="model",
            code="model_not_found",
        )
    return str(model)


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for an empty name, or one that two models have."""
    for name in names:
        if not name.strip():
            raise ConfigError("--served-model-name", name, "must not be empty")
        if names.count(name) > 1:
            raise ConfigError("--served-model-name", name, "would name two models; give each a name of its own")


class ServedModels:
    """All models of a server. All calls come from one event loop.

    Args:
        models: the first answers requests that name none.
        max_queue: of each model: see `CompletionService`.
        max_choices: see `ServerOptions`.

    Raises:
        ConfigError: see `check_names`.
    """

    def __init__(
        self, models: Sequence[NamedModel], group: Group, metrics: ServerMetrics, max_queue: int, max_choices: int
    ):
        check_names([model.name for model in models])
        #: Set when an engine has failed.
        self.failed = asyncio.Event()
        self._draining = False
        shares = ThreadShares()
        self._models = {
            model.name: ServedModel(
                ModelFacts(
                    model.name,
                    model.engine.tokenizer,
                    model.engine.vocab_size,
                    model.engine.context_length,
                    model.engine.max_tokens,
                    min(max_choices, model.engine.max_batch + max_queue),
                ),
                CompletionService(
                    model.engine, group, ModelMetrics(metrics, model.name), max_queue, self.failed, shares
                ),
                model.shown,
            )
            for model in models
        }

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def asked(self, body: Mapping[str, Any]) -> ServedModel:
        """Returns the model that a request asks for; ApiError if it is not here."""
        return self._models[asked_model(body, list(self._models))]

    @property
    def num_open(self) -> int:
        """Choices that the engines still know."""
        return sum(model.service.num_open for model in self)

    @property
    def status(self) -> str:
        """ready, draining or failed, as all of them are."""
        return "failed" if self.failed.is_set() else "draining" if self._draining else "ready"

    def check_open(self) -> None:
        """Raises ApiError if no requests are taken."""
        if self.failed.is_set():
            raise failed_error()
        if self._draining:
            raise draining_error()

    def start(self) -> None:
        """Starts the engines' threads; the running event loop gets their news."""
        for model in self:
            model.service.start()

    def fail(self) -> None:
        """Ends all open choices with an error: the server goes with the first engine that fails."""
        for model in self:
            model.service.fail()

    async def drain(self, timeout_s: float) -> bool:
        """Takes no more requests, and waits for those there are; then ends them. Returns whether all were complete."""
        self._draining = True
        return all(await asyncio.gather(*(model.service.drain(timeout_s) for model in self)))

    async def stop(self, timeout_s: float) -> bool:
        """Ends the engines' threads; returns whether all ended in time."""
        return all(await asyncio.gather(*(model.service.stop(timeout_s) for model in self)))
