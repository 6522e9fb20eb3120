"""Connections that wait for their client: each ends by a deadline, and however many there are, others are answered."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import time
from functools import partial

import pytest

from megatron_samoe.runtime.load import LoadedModel
from tests.harness.serving import Client, SlowEngine, serving, wait_for

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LENGTH, CHUNKS = b"Content-Length: 9999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
#: What a client sends, what it then sends every moment, and the statuses that it is answered with.
WAITS = {
    "nothing": (b"", b"", [408]),
    "half a head": (GET, b"", [408]),
    "a head by bytes": (GET, b"a", [408]),
    "nothing after an answer": (GET + b"\r\n", b"", [200]),
    "half a head after an answer": (GET + b"\r\n" + GET, b"", [200, 408]),
    "half a body": (POST + LENGTH + b"{", b"", [408]),
    "a body by bytes": (POST + LENGTH, b"1", [408]),
    "a body by chunks": (POST + CHUNKS, b"1\r\n1\r\n", [408]),
    "half a chunk": (POST + CHUNKS + b"f\r\n{", b"", [408]),
    "a body that is not asked for": (GET + LENGTH, b"1", [200]),
    "a body that is announced": (POST + b"Expect: 100-continue\r\n" + LENGTH, b"", [100, 408]),
    "a body for nobody": (POST.replace(b"completions", b"nothing") + LENGTH, b"1", [404]),
    "a body of another type": (POST.replace(b"json", b"xml") + LENGTH, b"1", [415]),
}


def opened(client: Client, beginning: bytes) -> socket.socket:
    connection = socket.create_connection((client.host, client.port), timeout=20)
    connection.sendall(beginning)
    return connection


def received(connection: socket.socket) -> bytes:
    """Returns what comes next, nothing at the end: also where the other side has closed before it had read all."""
    try:
        return connection.recv(4096)
    except ConnectionResetError:
        return b""


def statuses(content: bytes) -> list[int]:
    return [int(part.split()[0]) for part in content.split(b"HTTP/1.1 ")[1:]]


def error_of(content: bytes) -> dict[str, str | None]:
    (error,) = json.loads(content.partition(b"\r\n\r\n")[2]).values()
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_each_wait_for_a_client_ends(loaded: LoadedModel) -> None:
    with serving(loaded, body_timeout_s=0.4) as running:
        waiting = {what: opened(running.client, beginning) for what, (beginning, _, _) in WAITS.items()}
        came = dict.fromkeys(WAITS, b"")
        deadline = time.monotonic() + 10
        while waiting:
            assert time.monotonic() < deadline, f"still open: {list(waiting)}"
            for what, connection in list(waiting.items()):
                with contextlib.suppress(ConnectionError):
                    connection.sendall(WAITS[what][1])
                connection.settimeout(0.005)
                try:
                    piece = received(connection)
                except TimeoutError:
                    continue
                came[what] += piece
                if not piece:
                    waiting.pop(what).close()
    for what, (_, _, expected) in WAITS.items():
        assert statuses(came[what]) == expected, what
        if expected == [408]:
            error = error_of(came[what])
            assert error["code"] == "timeout" and "did not come within 0.4 s" in str(error["message"])


def test_answers_may_take_longer_than_their_requests(loaded: LoadedModel) -> None:
    with serving(loaded, engine=SlowEngine(loaded, max_batch=1), body_timeout_s=0.2) as running:
        assert running.client.complete("x", max_tokens=30, ignore_eos=True).status == 200


@pytest.mark.parametrize(
    ("beginning", "max_connections", "files", "most"),
    [
        (b"", 2, 10**4, 72),
        (GET, 2, 10**4, 72),
        (GET + b"\r\n", 2, 10**4, 72),
        (POST + LENGTH + b"{", 2, 10**4, 72),
        (GET, 256, 300, 150),
    ],
)
def test_however_many_wait_others_are_answered(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, beginning: bytes, max_connections: int, files: int, most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    with serving(loaded, max_connections=max_connections) as running:
        held, is_answered = [], beginning.endswith(b"\r\n\r\n")
        for _ in range(most + 20):
            held.append(opened(running.client, beginning))
            came = b"ready" if not is_answered else b""
            while b"ready" not in came:
                came = received(held[-1])
                assert came, "it was closed before it was answered"
        assert running.client.complete("x", max_tokens=1).status == 200
        # The first have waited longest.
        for connection in held[:20]:
            content = b"".join(iter(partial(received, connection), b""))
            if is_answered:
                assert content == b"", "nothing was asked that could be refused"
            else:
                assert content.startswith(b"HTTP/1.1 503") and b"\r\nRetry-After: 1\r\n" in content
                assert error_of(content)["code"] == "too_many_connections"
        assert not select.select(held[30:], [], [], 0)[0], "the others go on waiting"
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        GET + b"X: " + b"x" * 20_000,
        GET + b"Content-Length: x\r\n\r\n",
        GET + CHUNKS + b"not a length\r\n",
        POST + CHUNKS + b"not a length\r\n",
        b"HEAD" + GET[3:] + CHUNKS + b"not a length\r\n",
    ],
)
def test_what_is_not_http_is_refused_in_the_shape_of_errors(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    with serving(loaded) as running, opened(running.client, sent) as connection:
        content = b"".join(iter(partial(received, connection), b""))
        assert content.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert error_of(content)["code"] == "invalid_http"
        assert running.client.ask("GET", "/health").status == 200
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs Linux")
def test_a_client_that_does_not_read_is_left(loaded: LoadedModel) -> None:
    with serving(loaded, body_timeout_s=0.3) as running, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((running.client.host, running.client.port))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)
        connection.setblocking(False)

        def is_left() -> bool:
            try:
                connection.send(b"\r\n")
            except (ConnectionResetError, BrokenPipeError):
                return True
            return False

        wait_for(is_left)
