"""The routes: OpenAI's completions and models, health, metrics and the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megatron_samoe.inference.expert_use import expert_use
from megatron_samoe.inference.server.answers import ChatAnswers, CompletionAnswers, joined_logprobs
from megatron_samoe.inference.server.chat_protocol import parse_chat
from megatron_samoe.inference.server.expert_protocol import experts_body, parse_text
from megatron_samoe.inference.server.gate import CLIENT_GONE, ROUTES, Gate, GateLimits, error_response, gone, read_body
from megatron_samoe.inference.server.jobs import Job
from megatron_samoe.inference.server.metrics import ServerMetrics
from megatron_samoe.inference.server.models import ServedModel, ServedModels
from megatron_samoe.inference.server.protocol import ApiError, CompletionCall, ModelFacts, parse_body, parse_completion
from megatron_samoe.log import logger

PAGE = Path(__file__).with_name("page.html")


#: Makes a call of a body.
_Parse: TypeAlias = Callable[[Mapping[str, Any], ModelFacts], CompletionCall]


class _Routes:
    """The handlers."""

    def __init__(self, models: ServedModels, metrics: ServerMetrics, max_body_bytes: int, body_timeout_s: float):
        self._models, self._metrics = models, metrics
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s
        self._started = int(time.time())
        self._page = PAGE.read_bytes()
        self._page_headers = {
            "Content-Security-Policy": _content_policy(self._page.decode()),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    async def page(self, _: Any) -> Any:
        return Response(self._page, media_type="text/html", headers=self._page_headers)

    async def health(self, _: Any) -> Any:
        status = self._models.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def metrics(self, _: Any) -> Any:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, _: Any) -> Any:
        return JSONResponse({"object": "list", "data": [self._described(m) for m in self._models]})

    async def model(self, request: Request) -> Any:
        return JSONResponse(self._described(self._models.asked({"model": request.path_params["name"]})))

    def _described(self, model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.facts.name,
            "object": "model",
            "created": self._started,
            "owned_by": "megatron_samoe",
            "max_model_len": model.facts.context_length,
            "shows_experts": model.shown is not None,
            "chats": model.facts.tokenizer.chat.template is not None,
        }

    async def experts(self, request: Request) -> Any:
        """Which experts each token of a text uses, by the model as it was trained: one text at a time."""
        body, model = await self._asked(request)
        if model.shown is None:
            raise ApiError(
                404, "This server shows no experts: it was started without --show-experts.", code="not_found"
            )
        ids = await asyncio.to_thread(parse_text, body, model.facts)
        async with model.showing:
            layers = await asyncio.to_thread(expert_use, model.shown, ids)
        return JSONResponse(experts_body(ids, layers, model.facts.tokenizer))

    async def completions(self, request: Request) -> Any:
        return await self._answered(request, parse_completion, CompletionAnswers)

    async def chat(self, request: Request) -> Any:
        return await self._answered(request, parse_chat, ChatAnswers)

    async def _asked(self, request: Request) -> tuple[dict[str, Any], ServedModel]:
        """Returns the body of a request, and the model that it asks for."""
        self._models.check_open()
        raw = await read_body(request.headers, request.receive, self._max_body_bytes, self._body_timeout_s)
        # JSON and tokenizers take their time over a long prompt, and other requests' tokens wait for this thread.
        body = await asyncio.to_thread(parse_body, raw)
        return body, self._models.asked(body)

    async def _answered(self, request: Request, parse: _Parse, form: type[CompletionAnswers]) -> Any:
        body, model = await self._asked(request)
        call = await asyncio.to_thread(parse, body, model.facts)
        self._models.check_open()  # again: the body took its time
        job = model.service.open(call.requests, call.prompt_tokens)
        answers = form(call, model.facts.name, model.facts.tokenizer, int(time.time()))
        if call.stream:
            return _EventStream(self._stream(call, job, answers), job)
        return await self._complete(call, job, answers, request.receive)

    async def _complete(self, call: CompletionCall, job: Job, answers: CompletionAnswers, receive: Any) -> Any:
        texts, num_tokens = list(call.heads), 0
        reasons: list[str | None] = [None] * len(texts)
        logprobs: list[list[dict]] = [[] for _ in texts]

        async def collect() -> None:
            nonlocal num_tokens
            async for index, made in job.tokens():
                event = call.shown(made)
                texts[index] += event.text
                reasons[index] = event.finish_reason
                num_tokens += call.adds_tokens
                if call.tells_logprobs:
                    logprobs[index].append(answers.logprobs(index, event))

        if not await _done_for_client(collect(), job, receive):
            return Response(status_code=CLIENT_GONE)
        choices = [
            answers.choice(i, text, reason, joined_logprobs(parts))
            for i, (text, reason, parts) in enumerate(zip(texts, reasons, logprobs, strict=True))
        ]
        return JSONResponse(answers.body(choices, num_tokens))

    async def _stream(self, call: CompletionCall, job: Job, answers: CompletionAnswers) -> AsyncIterator[bytes]:
        num_tokens, heads = 0, list(call.heads)
        for index in range(len(heads)):
            if (opening := answers.opening(index)) is not None:
                yield _event(answers.body([opening], None, streamed=True))
        try:
            async for index, made in job.tokens():
                event = call.shown(made)
                num_tokens += call.adds_tokens
                text, logprobs = event.text, None
                if call.tells_logprobs:
                    # A prompt's probabilities come with the first token, so its text waits for them.
                    text, heads[index] = heads[index] + text, ""
                    logprobs = answers.logprobs(index, event)
                if text or event.finish_reason or logprobs:
                    piece = answers.streamed(index, text, event.finish_reason, logprobs)
                    yield _event(answers.body([piece], None, streamed=True))
        except ApiError as error:
            # The status is long sent, so the error comes as an event, and no [DONE] follows.
            yield _event(error.body)
            return
        if call.include_usage:
            yield _event(answers.body([], num_tokens, streamed=True))
        yield b"data: [DONE]\n\n"


class _EventStream:
    """A response of server-sent events that ends, with its job, when the client goes or all is said."""

    def __init__(self, events: AsyncIterator[bytes], job: Job):
        self._events, self._job = events, job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]

        async def pump() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        with contextlib.suppress(OSError):  # the client has gone while it was sent something
            await _done_for_client(pump(), self._job, receive)


async def _done_for_client(work: Coroutine[Any, Any, None], job: Job, receive: Any) -> bool:
    """Does the work of a job unless the client goes before, and closes the job; returns whether all was done."""
    done, left = asyncio.create_task(work), asyncio.create_task(gone(receive))
    try:
        await asyncio.wait((done, left), return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            done.result()
        return done.done()
    finally:
        job.close()
        for task in (done, left):
            task.cancel()


def _event(body: dict) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _content_policy(page: str) -> str:
    """Returns a policy under which a browser runs the page's own script and style, and loads nothing else."""

    def digests(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in found)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _answer_error(_: Any, error: Any) -> Any:
    return error_response(error)


async def _answer_nobody(_: Any, error: Any) -> Any:
    return Response(status_code=CLIENT_GONE)


async def _answer_http_error(request: Any, error: Any) -> Any:
    """Answers for paths and methods that there are not."""
    path, method = request.url.path[:80], request.method
    message = {
        404: f"There is no {path!r} here; there are {', '.join(ROUTES)}.",
        405: f"{path!r} does not take {method}.",
    }.get(error.status_code, str(error.detail))
    allow = (error.headers or {}).get("Allow")
    code = "not_found" if error.status_code == 404 else None
    return error_response(ApiError(error.status_code, message, code=code, allow=allow))


async def _answer_fault(_: Any, error: Any) -> Any:
    logger.error("a request failed: %r", error)
    return error_response(
        ApiError(500, "The server has failed at this request; its log has the reason.", kind="server_error")
    )


def build_app(
    models: ServedModels, metrics: ServerMetrics, gate: GateLimits, max_body_bytes: int, body_timeout_s: float
) -> Any:
    """Returns the ASGI application of a server."""
    routes = _Routes(models, metrics, max_body_bytes, body_timeout_s)
    paths = [
        Route("/", routes.page),
        Route("/health", routes.health),
        Route("/metrics", routes.metrics),
        Route("/v1/models", routes.models),
        Route("/v1/models/", routes.models),
        Route("/v1/models/{name:path}", routes.model),
        Route("/v1/completions", routes.completions, methods=["POST"]),
        Route("/v1/chat/completions", routes.chat, methods=["POST"]),
        Route("/v1/experts", routes.experts, methods=["POST"]),
    ]
    handlers: Any = {
        ApiError: _answer_error,
        HTTPException: _answer_http_error,
        ConnectionError: _answer_nobody,
        Exception: _answer_fault,
    }
    app = Gate(Starlette(routes=paths, exception_handlers=handlers), gate, metrics)
    if not gate.allowed_origins:
        return app
    # Outside the gate, so that pages of these origins can read its refusals, too, and that preflights need no token.
    return CORSMiddleware(
        app,
        allow_origins=gate.allowed_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("Authorization", "Content-Type"),
        expose_headers=("Retry-After",),
    )
