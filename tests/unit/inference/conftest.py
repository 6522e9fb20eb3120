"""What tests of servers share: a tiny model of random weights, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_samoe.runtime.load import LoadedModel
from tests.harness.serving import Client, load_tiny, save_tiny, serving


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A SaMoE over bytes."""
    torch.set_num_threads(1)
    return load_tiny(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def client(loaded: LoadedModel) -> Iterator[Client]:
    """Asks a server that takes little at a time."""
    with serving(loaded, max_queue=4, max_choices=6, max_body_bytes=2000, max_connections=16) as running:
        yield running.client
