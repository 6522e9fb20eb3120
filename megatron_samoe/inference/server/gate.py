"""The gate of every HTTP request before its route: limits, who may ask, and a count of answers.

Plain ASGI, because the usual wrappers hide from a route that its client has gone.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from starlette.responses import JSONResponse

from megatron_samoe.inference.server.metrics import ServerMetrics
from megatron_samoe.inference.server.protocol import ApiError

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Paths that need no token: the page asks for it, and balancers have none.
OPEN_PATHS = ("/", "/health")
ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/experts")
#: A body that is too large is still read up to this multiple of the limit, so that its sender hears the reason: many
#: clients look for an answer only after they have sent everything.
OVERREAD = 16
#: What servers log for a request whose client did not wait for the answer; nobody reads it.
CLIENT_GONE = 499


@dataclass(frozen=True)
class GateLimits:
    """See `ServerOptions`."""

    api_key: str | None
    allowed_hosts: tuple[str, ...]
    allowed_origins: tuple[str, ...]
    max_connections: int


class Gate:
    """Wraps an ASGI application."""

    def __init__(self, app: App, limits: GateLimits, metrics: ServerMetrics):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if limits.api_key is None else limits.api_key.encode()
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request or hands it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else "other"

        status, is_complete = 0, False

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False) and not is_complete:
                is_complete = True
                self._metrics.count_http(route, status)
            await send(message)

        has_slot = False

        def take_slot() -> None:
            nonlocal has_slot
            if has_slot:
                return
            if self._num_open >= self._limits.max_connections:
                raise ApiError(
                    503,
                    f"The server answers {self._limits.max_connections} HTTP requests at a time, and has that many.",
                    kind="service_unavailable_error",
                    code="too_many_connections",
                    retry_after_s=1,
                )
            has_slot = True
            self._num_open += 1

        async def received() -> MutableMapping[str, Any]:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                take_slot()
            return message

        try:
            self._check(scope)
            # A body that is still on its way takes no slot of complete requests.
            if scope["method"] != "POST":
                take_slot()
        except ApiError as error:
            await error_response(error)(scope, receive, counted)
        else:
            await self._app(scope, received, counted)
        finally:
            self._num_open -= has_slot
            if status and not is_complete:  # a stream whose client has gone
                self._metrics.count_http(route, CLIENT_GONE)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        # A page of another site whose name was made to lead here comes with that name; browsers always send one, and
        # only HTTP/1.0 may do without.
        host = headers.get(b"host", b"").decode("latin-1")
        named = b"host" in headers and bool(self._limits.allowed_hosts)
        if named and host_name(host) not in self._limits.allowed_hosts:
            raise ApiError(
                403,
                f"The server does not answer under the name {host[:80]!r}; --allowed-hosts adds names.",
                code="host_not_allowed",
            )
        self._check_origin(headers.get(b"origin", b"").decode("latin-1"), host)
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        # Compared in a time that does not reveal how much of it is right.
        if kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._key):
            what = "is wrong" if kind else 'is missing: the header "Authorization: Bearer ..." is needed'
            raise ApiError(401, f"The access token {what}.", kind="authentication_error", code="invalid_api_key")

    def _check_origin(self, origin: str, host: str) -> None:
        """Raises ApiError for a page of another site. Browsers name it; programs and the server's own page pass."""
        allowed = self._limits.allowed_origins
        if origin and not is_own(origin, host) and not {"*", origin.lower()} & set(allowed):
            raise ApiError(
                403,
                f"The server does not answer pages of {origin[:80]!r}; --allowed-origins adds origins.",
                code="origin_not_allowed",
            )


def is_own(origin: str, host: str) -> bool:
    """Returns whether an Origin header names the server that a Host header names; a proxy may have changed the scheme."""
    scheme, _, address = origin.lower().partition("://")
    usual = {"http": ":80", "https": ":443"}.get(scheme)
    return usual is not None and address.removesuffix(usual) == host.strip().lower().removesuffix(usual)


def host_name(header: str) -> str:
    """Returns a Host header's name without its port, in small letters."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1 : name.find("]")]
    return name.rsplit(":", 1)[0] if ":" in name else name


async def read_body(headers: Any, receive: Receive, limit: int, timeout_s: float) -> bytes:
    """Returns a request's body.

    Raises:
        ApiError: it is larger than the limit, is not JSON by its type, or does not come in time.
        ConnectionError: the client has gone.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # This also keeps pages of other sites out: a browser sends them this type only after it has asked.
        raise ApiError(
            415,
            f"The request's Content-Type must be application/json, not {kind[:60]!r}.",
            code="unsupported_media_type",
        )
    try:
        return await asyncio.wait_for(_collect(receive, limit), timeout_s)
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise ApiError(408, f"The request's body did not come within {timeout_s:g} s.", code="timeout") from error


async def _collect(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client has gone")
        size += len(message.get("body", b""))
        if size <= limit:
            parts.append(message.get("body", b""))
        else:
            parts.clear()
        if size > limit * OVERREAD or (size > limit and not message.get("more_body", False)):
            raise ApiError(413, f"The request's body may have {limit} bytes, and has more.", code="body_too_large")
        if not message.get("more_body", False):
            return b"".join(parts)


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def error_response(error: ApiError) -> JSONResponse:
    """Returns an answer in OpenAI's shape of errors."""
    return JSONResponse(error.body, error.status, error.headers)
