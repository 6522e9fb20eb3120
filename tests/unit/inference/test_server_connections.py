"""Connections whose body does not come. Heads are a proxy's to wait for (examples/serve_nginx.conf)."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch

from megatron_samoe.runtime.load import LoadedModel
from tests.harness.serving import Client, load_tiny, read_to_end, save_tiny, serving


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    return load_tiny(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def client(loaded: LoadedModel) -> Iterator[Client]:
    with serving(loaded) as running:
        yield running.client


def test_slow_senders_are_timed_out(loaded: LoadedModel) -> None:
    with serving(loaded, body_timeout_s=0.2) as running:
        connection = socket.create_connection((running.client.host, running.client.port), timeout=20)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Content-Length: 99\r\n\r\n{")
        content = read_to_end(connection)
        connection.close()
        assert content.startswith(b"HTTP/1.1 408") and b"did not come within 0.2 s" in content
