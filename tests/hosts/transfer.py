"""Measures what an all-reduce of 8 MB takes between all ranks: `torchrun ... -m tests.hosts.transfer`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.parallel_state import backend

BYTES, ROUNDS = 8_000_000, 7


def main(argv: Sequence[str]) -> int:
    """Prints its seconds, on rank 0."""
    torch.set_num_threads(1)
    backend.initialize_distributed(ParallelConfig(), torch.device("cpu"))
    x, taken = torch.zeros(BYTES // 4), []
    for _ in range(ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(x)
        taken.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        print("seconds", statistics.median(taken), flush=True)
    dist.barrier()
    backend.leave_distributed()
    return 0
