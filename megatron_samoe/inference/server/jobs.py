"""The event loop's side of the engine: who waits for which tokens, how much may wait, and the end of service."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import Request, TokenEvent
from megatron_samoe.inference.server.metrics import ModelMetrics
from megatron_samoe.inference.server.protocol import ApiError, api_error
from megatron_samoe.inference.server.worker import Command, Ended, EngineWorker, Load, Notice, ThreadShares
from megatron_samoe.parallel_state.state import Group


def draining_error() -> ApiError:
    """The error of requests that come when service is about to end, or would not end in time."""
    return ApiError(
        503,
        "The server is shutting down: send the request to another one.",
        kind="service_unavailable_error",
        code="draining",
        retry_after_s=5,
    )


def failed_error() -> ApiError:
    """The error of requests when the engine has failed."""
    return ApiError(
        500,
        "The engine has failed, and the server is about to end; its log has the reason.",
        kind="server_error",
        code="engine_failed",
    )


@dataclass
class _Ticket:
    job: Job
    index: int
    accepted: float
    num_tokens: int = 0


@dataclass
class Job:
    """The choices of one HTTP request; iterate over it for (choice's index, token) and close it in any case."""

    service: CompletionService
    tickets: set[int] = field(default_factory=set)
    news: asyncio.Queue[tuple[int, TokenEvent] | ApiError] = field(default_factory=asyncio.Queue)

    async def tokens(self) -> AsyncIterator[tuple[int, TokenEvent]]:
        """Yields every choice's tokens as they come, until all choices are complete.

        Raises:
            ApiError: the engine refused or failed, or service ended before.
        """
        while self.tickets or not self.news.empty():
            item = await self.news.get()
            if isinstance(item, ApiError):
                raise item
            yield item

    def close(self) -> None:
        """Cancels what is not complete: nobody waits for it any more."""
        self.service.cancel(self.tickets)
        self.tickets = set()


class CompletionService:
    """Takes requests while there is room, and brings each its tokens. All calls come from one event loop.

    Args:
        max_queue: most choices that wait in addition to those that the engine runs.
        failed: set when the engine has failed, or that of another model of the same server, which ends with it.
        shares: see `EngineWorker`.
    """

    def __init__(
        self,
        engine: Engine,
        group: Group,
        metrics: ModelMetrics,
        max_queue: int,
        failed: asyncio.Event,
        shares: ThreadShares,
    ):
        self._capacity = engine.max_batch + max_queue
        self._max_batch = engine.max_batch
        self._metrics = metrics
        deliver, fail = partial(self._tell, self._deliver), lambda _: self._tell(self.fail)
        self._worker = EngineWorker(engine, group, deliver, fail, shares)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tickets: dict[int, _Ticket] = {}
        self._numbers = itertools.count()
        self._empty = asyncio.Event()
        self._empty.set()
        self._mean_duration_s = 1.0
        self._failed = failed
        metrics.set_load(Load(num_free_tokens=engine.num_free_tokens))

    @property
    def num_open(self) -> int:
        """Choices that the engine still knows."""
        return len(self._tickets)

    def start(self) -> None:
        """Starts the engine's thread; the running event loop gets its news."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    def open(self, requests: Sequence[Request], prompt_tokens: int) -> Job:
        """Queues the choices of a request, all or none.

        Raises:
            ApiError: too many choices wait.
        """
        if len(self._tickets) + len(requests) > self._capacity:
            raise self._too_many(len(requests))
        job = Job(self)
        self._metrics.count_prompt(prompt_tokens)
        now = time.monotonic()
        for index, request in enumerate(requests):
            number = next(self._numbers)
            self._tickets[number] = _Ticket(job, index, now)
            job.tickets.add(number)
            self._worker.send(Command("submit", number, request))
        self._empty.clear()
        return job

    def cancel(self, tickets: set[int]) -> None:
        """Tells the engine to drop choices; they count until it has."""
        for number in tickets:
            self._worker.send(Command("cancel", number))

    async def drain(self, timeout_s: float) -> bool:
        """Waits for the requests that there are; then ends them. Returns whether all were complete."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            jobs = {id(ticket.job): ticket.job for ticket in self._tickets.values()}
            for job in jobs.values():
                job.news.put_nowait(draining_error())
            return False
        return True

    async def stop(self, timeout_s: float) -> bool:
        """Ends the engine's thread; returns whether it ended in time."""
        return await asyncio.to_thread(self._worker.stop, timeout_s)

    def fail(self) -> None:
        """Ends all open choices with an error, for this engine has failed or that of another model."""
        self._failed.set()
        for ticket in self._tickets.values():
            self._metrics.count_end("failed")
            ticket.job.news.put_nowait(failed_error())
        self._tickets.clear()
        self._empty.set()

    def _too_many(self, num_choices: int) -> ApiError:
        # Once all that are open have been served there is room for any request; many come at the same moment, so
        # the time is a guess.
        wait_s = self._mean_duration_s * len(self._tickets) / self._max_batch
        return ApiError(
            429,
            f"The server is busy: it holds {len(self._tickets)} choices and takes at most {self._capacity}; the "
            f"request asks for {num_choices} more. Try again later.",
            kind="rate_limit_error",
            code="queue_full",
            retry_after_s=min(60, max(1, round(wait_s))),
        )

    def _tell(self, take: Callable[..., None], *news: Any) -> None:
        """Has the event loop take news, in the engine's thread; nobody is notified once service has ended."""
        assert self._loop is not None
        # RuntimeError: the loop is closed, since the server left before the engine's step had ended.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(take, *news)

    def _deliver(self, notices: list[Notice], load: Load) -> None:
        if self._failed.is_set():  # an engine that runs while another model's has failed
            return
        now = time.monotonic()
        self._metrics.set_load(load)
        for notice in notices:
            if isinstance(notice, Ended):
                ticket = self._tickets.pop(notice.ticket)
                self._metrics.count_end("refused" if notice.error else "cancelled")
                if notice.error is not None:
                    ticket.job.tickets.discard(notice.ticket)
                    ticket.job.news.put_nowait(api_error(notice.error))
                continue
            ticket = self._tickets[notice.request_id]
            age_s = now - ticket.accepted
            self._metrics.count_token(notice, age_s, is_first=ticket.num_tokens == 0)
            ticket.num_tokens += 1
            ticket.job.news.put_nowait((ticket.index, notice))
            if notice.finish_reason is not None:
                del self._tickets[notice.request_id]
                ticket.job.tickets.discard(notice.request_id)
                self._mean_duration_s += 0.1 * (age_s - self._mean_duration_s)
        if not self._tickets:
            self._empty.set()
