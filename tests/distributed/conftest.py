"""What several files of tests between ranks share."""

from __future__ import annotations

import pytest

from tests.harness import nccl_library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The stand-in for NCCL, compiled once."""
    return nccl_library.build(tmp_path_factory.mktemp("nccl"))
