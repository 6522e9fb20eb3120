"""What tests of the CUDA ops share: their library for CPU tensors, with emulated kernels."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.ops import extension
from tests.harness import emulated_cuda


@pytest.fixture(scope="session")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the CUDA ops."""
    if shutil.which("g++") is None or not emulated_cuda.BINDINGS:
        pytest.skip("needs g++ and the source tree")
    return emulated_cuda.build_library(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def library(library_file: Path) -> Iterator[Any]:
    """The namespace of the CUDA ops."""
    definitions = emulated_cuda.load_library(library_file)
    yield getattr(torch.ops, emulated_cuda.NAMESPACE)
    definitions._destroy()


@pytest.fixture
def emulated(library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's ops are the CUDA ones."""
    monkeypatch.setattr(torch.ops, "megatron_samoe", library)
    monkeypatch.setattr(extension, "load", lambda: True)
    return library
