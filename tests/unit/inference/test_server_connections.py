"""Connections that end half-way, are slow, or bring several requests: each is answered, or closed with the reason."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch

from megatron_samoe.runtime.load import LoadedModel
from tests.harness.serving import Client, SlowEngine, load_tiny, read_to_end, save_tiny, serving


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load_tiny(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def client(loaded: LoadedModel) -> Iterator[Client]:
    with serving(loaded) as running:
        yield running.client


def test_a_client_that_has_ended_its_sending_side_is_answered(client: Client) -> None:
    body = b'{"prompt": "x", "max_tokens": 3, "temperature": 0, "ignore_eos": true}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    completion = head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    for request, part in ((b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"ready"), (completion, b'"length"')):
        with socket.create_connection((client.host, client.port), timeout=20) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            content = read_to_end(connection)
        assert content.startswith(b"HTTP/1.1 200") and part in content
    with socket.create_connection((client.host, client.port), timeout=20) as connection:
        connection.sendall(completion + completion)  # the second waits while the first is answered
        connection.shutdown(socket.SHUT_WR)
        content = read_to_end(connection)
        assert content.count(b"HTTP/1.1 200") == content.count(b'"length"') == 2
    with socket.create_connection((client.host, client.port), timeout=20) as connection:
        connection.sendall(completion[:-9])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(4096) == b"", "half a body will never be a whole one"


def test_slow_senders_are_timed_out(loaded: LoadedModel) -> None:
    with serving(loaded, body_timeout_s=0.2) as running:
        connection = socket.create_connection((running.client.host, running.client.port), timeout=20)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Content-Length: 99\r\n\r\n{")
        content = read_to_end(connection)
        connection.close()
        assert content.startswith(b"HTTP/1.1 408") and b"did not come within 0.2 s" in content


def test_connections_that_send_no_head_are_closed_with_the_reason(loaded: LoadedModel) -> None:
    with serving(loaded, body_timeout_s=0.3) as running:
        address = (running.client.host, running.client.port)
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        # Nothing; half a head; a request, and half a head of the next one.
        for beginning in (b"", whole[:20], whole + whole[:20]):
            with socket.create_connection(address, timeout=20) as connection:
                connection.sendall(beginning)
                content = read_to_end(connection)
            assert content.count(b"HTTP/1.1 200") == beginning.count(whole)
            assert b"HTTP/1.1 408" in content and b"within 0.3 s" in content
        # Answers may take longer than heads.
        with serving(loaded, engine=SlowEngine(loaded), body_timeout_s=0.2) as slow:
            assert slow.client.complete("x", max_tokens=30, ignore_eos=True).status == 200
