"""Ranges that torch's profiler and Nsight Systems show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def named_range(name: str, device: torch.device) -> Iterator[None]:
    """Names what happens within it, for torch's profiler and, on CUDA, as an NVTX range for Nsight Systems."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.nvtx.range(name))
        stack.enter_context(torch.profiler.record_function(name))
        yield
