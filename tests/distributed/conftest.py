"""What several files of tests between ranks share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_samoe.ops import extension
from tests.harness import nccl_library
from tests.harness.exchanges import Transport
from tests.harness.program import write_corpus


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The stand-in for NCCL, compiled once."""
    if shutil.which("g++") is None or not extension.available():
        pytest.skip("needs g++ and the compiled extension")
    return nccl_library.build(tmp_path_factory.mktemp("nccl"))


@pytest.fixture
def transport(request: pytest.FixtureRequest) -> Transport:
    """The transport that a parameter names: "nodes 0011" is one of four ranks on two hosts."""
    if not extension.available():
        pytest.skip("the compiled extension is not built")
    kind, hosts = request.param.split()
    library = "" if kind == "shm" else request.getfixturevalue("library")
    return Transport(kind, tuple(map(int, hosts)), library)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of random tokens, which tests only read."""
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")
