"""Where ops run in tests: on the CPU, by the CUDA kernels' own source, emulated for CPU tensors, or on a GPU.

A conftest.py takes the fixtures from here. Parameters of a GPU are skipped where there is none, with the reason; `-m gpu`
runs these alone.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.ops import extension
from tests.harness import emulated_cuda
from tests.harness.host_waits import as_if_asynchronous

#: On a CPU by its kernels; on a CPU by the algorithms of a device that runs behind its host, without kernels of ours; by the
#: CUDA kernels, emulated; and on a GPU.
CPU, GPU = "cpu", pytest.param("cuda", marks=pytest.mark.gpu)
BEHIND_HOST, EMULATED = "behind host", "emulated"
DEVICES = [CPU, BEHIND_HOST, EMULATED, GPU]


def gpu_problem() -> str:
    """Returns why the CUDA kernels cannot be tested here, or an empty string."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not extension.has_cuda_kernels():
        return "the extension has no CUDA kernels; build it with MEGATRON_SAMOE_BUILD=cuda"
    return ""


def skip_without(kind: str) -> None:
    """Skips a test of a GPU where there is none."""
    if kind == "cuda" and gpu_problem():
        pytest.skip(gpu_problem())


@pytest.fixture(scope="session")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the CUDA ops for CPU tensors."""
    if shutil.which("g++") is None or not emulated_cuda.BINDINGS:
        pytest.skip("needs g++ and the source tree")
    return emulated_cuda.build_library(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def library(library_file: Path) -> Iterator[Any]:
    """The namespace of its ops."""
    definitions = emulated_cuda.load_library(library_file)
    yield getattr(torch.ops, emulated_cuda.NAMESPACE)
    definitions._destroy()


@pytest.fixture
def emulated(library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's ops are the CUDA ones."""
    monkeypatch.setattr(torch.ops, "megatron_samoe", library)
    monkeypatch.setattr(extension, "load", lambda: True)
    return library


@contextlib.contextmanager
def running_on(kind: str, request: pytest.FixtureRequest, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yields the device for tensors of a test that runs on one of `DEVICES`."""
    skip_without(kind)
    if kind == EMULATED:
        request.getfixturevalue("emulated")
    patch.setenv(extension.CUDA_ENVIRONMENT_VARIABLE, "1" if kind == "cuda" else "0")
    extension._asked_for.cache_clear()
    with as_if_asynchronous() if kind == BEHIND_HOST else contextlib.nullcontext():
        yield "cuda" if kind == "cuda" else "cpu"
    extension._asked_for.cache_clear()


@pytest.fixture(params=[CPU, GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of a test's tensors; a test names others of `DEVICES` by `on`."""
    with running_on(request.param, request, monkeypatch) as device:
        yield device


def on(*kinds: Any) -> pytest.MarkDecorator:
    """Parametrizes a test's `device`."""
    return pytest.mark.parametrize("device", kinds, indirect=True)
