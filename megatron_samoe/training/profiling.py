"""torch's profiler over some steps of some ranks, and ranges that Nsight Systems shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.config.training import LoggingConfig
from megatron_samoe.log import logger


class StepProfiler:
    """Profiles the steps from --profile-step-start on, before --profile-step-end, on this rank if it is to.

    Args:
        folder: where `rank-N.json.gz` goes, to be opened with Perfetto or chrome://tracing.
    """

    def __init__(self, config: LoggingConfig, rank: int, device: torch.device, folder: Path | None):
        self._config, self._rank, self._device, self._folder = config, rank, device, folder
        self._is_on = config.profile and rank in config.profile_ranks and folder is not None
        self._profiler: Any = None

    @contextlib.contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """Is around the step that has this number, counted from 1."""
        if self._is_on and iteration == self._config.profile_step_start and self._profiler is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.__enter__()
        with named_range(f"iteration {iteration}", self._device):
            yield
        if self._profiler is not None and iteration + 1 >= self._config.profile_step_end:
            self.finish()

    def finish(self) -> None:
        """Ends the profile, if one runs, and writes it."""
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        assert self._folder is not None
        path = self._folder / f"rank-{self._rank:05d}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(path))
            logger.warning(f"profile of rank {self._rank}: {path}")
        except (OSError, RuntimeError) as error:
            logger.warning(f"the profile {path} cannot be written: {error}")
        self._profiler, self._is_on = None, False


@contextlib.contextmanager
def named_range(name: str, device: torch.device) -> Iterator[None]:
    """Names what happens within it, for torch's profiler and, on CUDA, as an NVTX range for Nsight Systems."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.nvtx.range(name))
        stack.enter_context(torch.profiler.record_function(name))
        yield
