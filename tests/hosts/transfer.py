"""Measures what an all-reduce and an all-to-all of 8 MB take between all ranks: `torchrun ... -m tests.hosts.transfer`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.parallel_state import backend

BYTES, ROUNDS = 8_000_000, 7


def main(argv: Sequence[str]) -> int:
    """Prints seconds of each, on rank 0."""
    torch.set_num_threads(1)
    backend.initialize_distributed(ParallelConfig(), torch.device("cpu"))
    x, y = torch.zeros(BYTES // 4), torch.zeros(BYTES // 4)
    found = {
        "all-reduce": _seconds(lambda: dist.all_reduce(x)),
        "all-to-all": _seconds(lambda: dist.all_to_all_single(y, x)),
    }
    if dist.get_rank() == 0:
        print("seconds", json.dumps(found), flush=True)
    dist.barrier()
    backend.leave_distributed()
    return 0


def _seconds(action: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
