"""A minute before a job of days: whether every rank has the memory, the speed, the links and the clock that it should."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError, in_units
from megatron_samoe.log import logger
from megatron_samoe.parallel_state.state import Group, ParallelState
from megatron_samoe.planning.cluster import Cluster, Links
from megatron_samoe.planning.gpus import measured_cluster, measured_dtype, read_measured
from megatron_samoe.planning.layer_work import Product
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.runtime.free_memory import free_memory_bytes

#: A rank or a group this much slower than the median is named.
SLOW = 0.6
#: Clocks may differ by this before logs of several hosts cannot be put side by side.
MOST_SECONDS_APART = 2.0
_BYTES, _ROUNDS, _SIZE = 4 << 20, 5, 512


def preflight(config: PretrainConfig, vocab_size: int, parallel: ParallelState) -> list[str]:
    """Tests all ranks, which call it together before the model is built; logs what it finds and returns the warnings.

    Raises:
        ConfigError: a rank has not the memory that it will need by the formulas of `planning.memory`.
    """
    if parallel.device.type == "cpu":
        _refuse_too_little_memory(config, vocab_size, parallel)
    hosts = parallel.world.all_gather_object(socket.gethostname())
    ranks = [f"rank {rank}" + (f" ({host})" if len(set(hosts)) > 1 else "") for rank, host in enumerate(hosts)]
    path = config.parallel.preflight_calibration
    calibrated = None if path is None else measured_cluster(read_measured(Path(path)), parallel.world_size)
    warnings = [*_clocks(parallel, ranks), *_speeds(parallel, ranks, calibrated), *_links(parallel, calibrated)]
    for warning in warnings:
        logger.warning(f"preflight: {warning}") if parallel.rank == 0 else None
    logger.info(f"preflight: {'done' if warnings else 'all is well'}")
    return warnings


def _refuse_too_little_memory(config: PretrainConfig, vocab_size: int, parallel: ParallelState) -> None:
    """Compares what the ranks of each host need with what the host has left."""
    needed = rank_memory(config, vocab_size, parallel.world_size, parallel.rank).total
    rows = parallel.world.all_gather_object((socket.gethostname(), needed, free_memory_bytes(parallel.device)))
    for host in sorted({row[0] for row in rows}):
        of_host = [row for row in rows if row[0] == host]
        total, left = sum(row[1] for row in of_host), min(row[2] for row in of_host)
        logger.info(
            f"preflight: {len(of_host)} ranks of {host} will need {in_units(total, 'B')} of {in_units(left, 'B')}"
        )
        if total > left:
            raise ConfigError(
                "--preflight",
                True,
                f"{len(of_host)} ranks of {host} will need {in_units(total, 'B')} and it has "
                f"{in_units(left, 'B')} left; fewer ranks per host, --use-distributed-optimizer, a smaller "
                "--micro-batch-size or --recompute-granularity full need less (see megatron-samoe plan)",
            )


def _clocks(parallel: ParallelState, ranks: Sequence[str]) -> list[str]:
    """Compares the ranks' clocks, read after the rendezvous."""
    parallel.world.barrier()
    times = [float(t) for t in parallel.world.all_gather_object(time.time())]
    middle = statistics.median(times)
    return [
        f"the clock of {rank} is {t - middle:+.1f} s off the others'"
        for rank, t in zip(ranks, times, strict=True)
        if abs(t - middle) > MOST_SECONDS_APART
    ]


def _speeds(parallel: ParallelState, ranks: Sequence[str], calibrated: Cluster | None) -> list[str]:
    """Compares what ranks compute in a second, all at once as in training."""
    x = torch.ones(_SIZE, _SIZE, device=parallel.device, dtype=measured_dtype(parallel.device))
    torch.mm(x, x)
    seconds = []
    for _ in range(_ROUNDS):
        parallel.world.barrier()
        seconds.append(_timed(lambda: [torch.mm(x, x) for _ in range(8)], parallel.device))
    rates = [8 * 2 * _SIZE**3 / s for s in parallel.world.all_gather_object(statistics.median(seconds))]
    logger.info(f"preflight: {in_units(min(rates), 'FLOP/s')} to {in_units(max(rates), 'FLOP/s')} per rank")
    product = Product(_SIZE, _SIZE, _SIZE, x.element_size())
    usual = None if calibrated is None else product.flops / product.seconds(calibrated, 1, 0)
    return _slow(rates, ranks, "FLOP/s") + _below(rates, ranks, "FLOP/s", usual)


def _links(parallel: ParallelState, calibrated: Cluster | None) -> list[str]:
    """Compares the groups of each kind by what an all-reduce carries."""
    warnings = []
    for name in ("tp", "cp", "ep", "dp", "pp"):
        group: Group = parallel.group(name)
        rate = 0.0
        if group.size > 1:
            x = torch.zeros(_BYTES // 4, device=parallel.device)
            group.all_reduce(x)
            seconds = [_timed(lambda x=x, group=group: group.all_reduce(x), parallel.device) for _ in range(_ROUNDS)]
            rate = 2 * (group.size - 1) / group.size * _BYTES / statistics.median(seconds)
        found = {ranks: rate for ranks, rate in parallel.world.all_gather_object((group.ranks, rate)) if rate}
        if found:
            least, most = (in_units(rate, "B/s") for rate in (min(found.values()), max(found.values())))
            logger.info(f"preflight: {least} to {most} in {name} groups")
            names = [f"the {name} group of ranks {list(r)}" for r in found]
            expected = None if calibrated is None else _BYTES / Links(parallel.grid, calibrated).seconds(name, _BYTES)
            warnings += _slow(list(found.values()), names, "B/s") + _below(list(found.values()), names, "B/s", expected)
    return warnings


def _slow(rates: Sequence[float], names: Sequence[str], unit: str) -> list[str]:
    usual = statistics.median_high(rates)  # of two the faster: their mean would hide the slower
    return [
        f"{name} has {in_units(rate, unit)}, the median is {in_units(usual, unit)}"
        for name, rate in zip(names, rates, strict=True)
        if rate < SLOW * usual
    ]


def _below(rates: Sequence[float], names: Sequence[str], unit: str, calibrated: float | None) -> list[str]:
    """Returns a warning for each rate that is far below what calibration found, if one did."""
    return [
        f"{name} has {in_units(rate, unit)}, calibration found {in_units(calibrated, unit)}"
        for name, rate in zip(names, rates, strict=True)
        if calibrated is not None and rate < SLOW * calibrated
    ]


def _timed(work: object, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()  # type: ignore[operator]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
