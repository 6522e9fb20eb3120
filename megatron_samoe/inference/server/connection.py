"""Connections that wait for their client, and what is not HTTP: uvicorn waits without end, and refuses in plain text."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_samoe.inference.server.protocol import ApiError


def waiting_protocol(most: int) -> Any:
    """Returns uvicorn's class of HTTP connections, with an end to each wait for a head.

    Uvicorn's time for idle connections begins with the connection, too, and ends with a complete head. Bodies have
    their own: see `read_body`.

    Args:
        most: connections; where one more comes, that which has waited longest for a head or a body is closed.
    """

    class WaitingProtocol(H11Protocol):
        _since = 0.0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._since = self.loop.time()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
            everyone: Any = self.connections
            if len(everyone) > most:
                error = ApiError(
                    503,
                    f"The server holds {most} connections, and this one has waited longest for its request.",
                    kind="service_unavailable_error",
                    code="too_many_connections",
                    retry_after_s=1,
                )
                min((one for one in everyone if one._waits), key=lambda one: one._since)._give_up(error)

        def data_received(self, data: bytes) -> None:
            # Uvicorn ends its time here, at the first byte; `handle_events` does so at a complete head.
            self.conn.receive_data(data)
            self.handle_events()

        def on_response_complete(self) -> None:
            self._since = self.loop.time()
            super().on_response_complete()

        def timeout_keep_alive_handler(self) -> None:
            what = f"The request's head did not come within {self.timeout_keep_alive:g} s."
            self._give_up(ApiError(408, what, code="timeout"))

        def send_400_response(self, msg: str) -> None:
            what = f"{msg} A request must be HTTP/1.1, with a head of at most 16 KiB."
            self._give_up(ApiError(400, what, code="invalid_http"))

        @property
        def _waits(self) -> bool:
            has_request = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
            return not has_request and not self.transport.is_closing()

        def _give_up(self, error: ApiError) -> None:
            """Closes the connection; says why, unless an answer has begun or nothing has come since the last one."""
            is_idle = self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not is_idle and not self.transport.is_closing():
                response = JSONResponse(error.body, headers={**error.headers, "Connection": "close"})
                lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
                lines += [f"{name.title()}: {value}" for name, value in response.headers.items()]
                self.transport.write("\r\n".join([*lines, "\r\n"]).encode() + response.body)
            self.transport.close()

    return WaitingProtocol
