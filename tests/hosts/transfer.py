"""Measures what exchanges of 8 MB take between all ranks: `torchrun ... -m tests.hosts.transfer`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.parallel_state import backend

BYTES, ROUNDS = 8_000_000, 7


def main(argv: Sequence[str]) -> int:
    """Prints the seconds of an all-reduce and of an all-to-all, on rank 0."""
    torch.set_num_threads(1)
    backend.initialize_distributed(ParallelConfig(), torch.device("cpu"))
    x, received = torch.zeros(BYTES // 4), torch.zeros(BYTES // 4)
    exchanges: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(x),
        "all-to-all": lambda: dist.all_to_all_single(received, x),
    }
    for what, exchange in exchanges.items():
        taken = []
        for _ in range(ROUNDS):
            dist.barrier()
            began = time.perf_counter()
            exchange()
            taken.append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            print(f"{what} seconds {statistics.median(taken)}", flush=True)
    dist.barrier()
    backend.leave_distributed()
    return 0
