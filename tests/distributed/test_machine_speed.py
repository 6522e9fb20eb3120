"""A machine measured by two ranks at once: what they exchange, and that all of them say the same."""

from __future__ import annotations

import time
from typing import Any

import torch

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.runtime.ranks import state_in_layout
from megatron_samoe.training.machine_speed import _Clock, measure
from tests.harness.ranks import run_ranks

LATE_S, EXCHANGE_S = 0.2, 0.02


def measured() -> tuple[dict[str, Any], float, float]:
    """Returns the figures, the seconds of an exchange to which the second rank comes late, and those of two groups of one rank,
    of which the second is slower.
    """
    parallel = state_in_layout(ParallelConfig(tensor_model_parallel_size=2), torch.device("cpu"))

    def exchange() -> None:
        parallel.world.barrier()
        time.sleep(EXCHANGE_S)

    clock = _Clock(parallel, rounds=1)
    late = clock.exchange_seconds(parallel.world, exchange, lambda: time.sleep(LATE_S * parallel.rank))
    slower = clock.exchange_seconds(parallel.ep, lambda: time.sleep(EXCHANGE_S * parallel.rank), lambda: None)
    return measure(parallel, rounds=1, scale=1 / 16), late, slower


def test_ranks_agree_on_their_links_and_count_the_slowest_group_but_not_who_comes_late() -> None:
    (first, late, slower), (second, *_) = run_ranks(measured, 2, more=("megatron_samoe.training.machine_speed",))
    links = ("intra_bandwidth", "inter_bandwidth", "latency_s", "sharded_exchange", "expert_exposed")
    assert [first[name] for name in links] == [second[name] for name in links]
    assert first["intra_bandwidth"] > 1e6 and first["latency_s"] >= 0 and first["gpus_per_node"] == 2
    assert min(first["sharded_exchange"], first["expert_exposed"]) > 0
    assert EXCHANGE_S <= late < LATE_S / 2 and slower >= EXCHANGE_S
