"""Connections on which nothing comes any more: uvicorn waits for a request's head without end, this closes them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from megatron_samoe.inference.server.protocol import ApiError

#: How long a request is still answered whose client has ended its sending side.
HALF_CLOSED_S = 1.0


def timed_protocol(timeout_s: float) -> Any:
    """Returns uvicorn's class of HTTP connections, with a time for the head of each request; 0 is no time at all."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        """From the first byte, or from the connection's start, a whole head must come in time."""

        _deadline: asyncio.TimerHandle | None = None
        _half_closed: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # No head is awaited where a request is being answered; between requests the keep-alive time counts.
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self._deadline is None and not self.transport.is_closing():
                self._start()

        def eof_received(self) -> bool | None:  # type: ignore[override]
            # Nothing tells a client that still reads from one that has gone, so it is taken for the first for a while.
            if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
                return None
            if self._half_closed is None:
                self._half_closed = self.loop.call_later(HALF_CLOSED_S, self.transport.close)
            return True

        def send_400_response(self, msg: str) -> None:
            # In the middle of an answer there is no place for another one.
            if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
                error = ApiError(400, f"{msg} Its head, or a chunk of its body, is not HTTP.", code="invalid_http")
                self.transport.write(_answer(error, "Bad Request"))
            self.transport.close()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._half_closed is not None and self.cycle.response_complete:
                self.transport.close()  # no further request can come, and none had come already
            # The beginning of the next request may have come with this one.
            waits = self.cycle.response_complete and bool(self.conn.trailing_data[0])
            if waits and self._deadline is None and not self.transport.is_closing():
                self._start()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            if self._half_closed is not None:
                self._half_closed.cancel()
            super().connection_lost(exc)

        def _start(self) -> None:
            self._deadline = asyncio.get_running_loop().call_later(timeout_s, self._give_up)

        def _stop(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            if not self.transport.is_closing():
                error = ApiError(408, f"No whole request head came within {timeout_s:g} s.", code="timeout")
                self.transport.write(_answer(error, "Request Timeout"))
                self.transport.close()

    return TimedProtocol


def _answer(error: ApiError, reason: str) -> bytes:
    """Returns a whole response, for where no route is reached."""
    body = json.dumps(error.body).encode()
    head = f"HTTP/1.1 {error.status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
