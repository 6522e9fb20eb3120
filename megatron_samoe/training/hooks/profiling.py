"""torch's profiler over some steps of some ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_samoe.config.training import LoggingConfig
from megatron_samoe.log import logger
from megatron_samoe.training.hook import Hook, Training
from megatron_samoe.training.micro_batches import Batch
from megatron_samoe.training.train_step import StepResult


class StepProfiler(Hook):
    """Profiles the steps from --profile-step-start on, before --profile-step-end, on the ranks that are to.

    `profile/rank-N.json.gz` next to the run's checkpoints is to be opened with Perfetto or chrome://tracing.
    """

    def __init__(self, config: LoggingConfig):
        self._config = config
        self._profiler: Any = None

    def pre_step(self, run: Training, batches: Sequence[Batch]) -> None:
        parallel = run.setup.parallel
        is_first = run.state.iteration + 1 == self._config.profile_step_start
        if is_first and parallel.rank in self._config.profile_ranks:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if parallel.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.__enter__()

    def post_step(self, run: Training, result: StepResult) -> None:
        if run.state.iteration + 1 >= self._config.profile_step_end:
            self.close(run)

    def close(self, run: Training) -> None:
        """Ends the profile, if one runs, and writes it."""
        folder = run.setup.config.folder_of("profile")
        if self._profiler is None or folder is None:
            return
        self._profiler.__exit__(None, None, None)
        rank = run.setup.parallel.rank
        path = folder / f"rank-{rank:05d}.json.gz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(path))
            logger.warning(f"profile of rank {rank}: {path}")
        except (OSError, RuntimeError) as error:
            logger.warning(f"the profile {path} cannot be written: {error}")
        self._profiler = None
