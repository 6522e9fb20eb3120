"""Tests of one GPU. Each runs on it, and over fewer sizes on the CPU, so that the tests are known to work where there is
no GPU; there the others are skipped, with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_samoe.ops import extension


def gpu_problem() -> str:
    """Returns why the CUDA kernels cannot be tested here, or an empty string."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not extension.has_cuda_kernels():
        return "the extension has no CUDA kernels; build it with MEGATRON_SAMOE_BUILD=cuda"
    return ""


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of a test; on the GPU, ops go to the CUDA kernels."""
    if not extension.available():
        pytest.skip("the compiled extension is not built")
    if request.param == "cuda" and gpu_problem():
        pytest.skip(gpu_problem())
    monkeypatch.setenv(extension.CUDA_ENVIRONMENT_VARIABLE, "1" if request.param == "cuda" else "0")
    extension._asked_for.cache_clear()
    yield request.param
    extension._asked_for.cache_clear()
