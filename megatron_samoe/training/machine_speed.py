"""Measures the constants of the planner's model of time on the machine at hand, by this program's own layers and groups."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.parallel_state import backend, launcher
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.parallel_state.state import Group, ParallelState, single_process_state
from megatron_samoe.planning.cluster import Cluster, Links
from megatron_samoe.planning.gpus import ATTENTION_WIDTH, measured_dtype
from megatron_samoe.planning.layer_work import Product
from megatron_samoe.planning.layout_cost import step_cost
from megatron_samoe.row_exchange.all_to_all import all_to_all_rows
from megatron_samoe.row_exchange.exchange import with_exchange
from megatron_samoe.runtime.free_memory import free_memory_bytes
from megatron_samoe.runtime.ranks import join_ranks, prepare_device
from megatron_samoe.training.machine import num_cores
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step

_VOCABULARY = 128
#: Seconds after which a figure is not measured again.
MOST_S = 1.0
#: Longest side of a product: large ones take milliseconds on a processor, and on a GPU.
_SIDE = {"cpu": 1024, "cuda": 8192}
#: Sides of the products that are timed, as parts of the longest: large, small, and thin in each way.
_SHAPES = ((1, 1, 1), (1 / 16, 1, 1), (1, 1 / 16, 1), (1, 1, 1 / 16), (1 / 4, 1 / 4, 1 / 4), (1 / 32, 1 / 4, 1))
_MESSAGES = (1 << 16, 1 << 20, 1 << 23, 1 << 26)
#: Bytes of the weights that products run through in turn: no cache holds them, as none holds a model's.
_WEIGHTS = {"cpu": 1 << 28, "cuda": 1 << 30}
_MOST_PRODUCTS = 256
#: Exchanges that are timed for each round of other work, and the products before each: the number that a layer has between two.
_EXCHANGES, _PRODUCTS_BETWEEN = 6, 4
#: Bytes of experts' rows that a rank exchanges.
_ROWS = {"cpu": 1 << 20, "cuda": 1 << 26}


def measure(parallel: ParallelState, rounds: int = 7, scale: float = 1.0) -> dict[str, Any]:
    """Returns fields of `Cluster` as all ranks find them at once, the slowest rank's where they differ.

    Args:
        parallel: whose tensor-parallel groups are the ranks of each host, and whose data-parallel groups join hosts.
        rounds: of which the median counts.
        scale: of sizes; below 1 for a trial.
    """
    device = parallel.device
    clock = _Clock(parallel, rounds)
    found: dict[str, Any] = {"memory_bytes": float(free_memory_bytes(device) // parallel.tp.size)}
    found["gpus_per_node"] = parallel.tp.size
    x = torch.ones(int(16 * scale * (1 << 20)), device=device)
    y = torch.empty_like(x)
    found["memory_bandwidth"] = 8 * x.numel() / clock.seconds(lambda: y.copy_(x))
    found |= _products(clock, device, found["memory_bandwidth"], scale) | {"efficiency": 1.0}
    found["attention_efficiency"] = _attention(clock, device, scale) / found["flops"]
    found["fp32_share"] = 1.0 if measured_dtype(device) == torch.float32 else Cluster.fp32_share
    found["attention_width"] = ATTENTION_WIDTH if device.type == "cuda" else 0
    found |= _links(clock, parallel, scale)
    if parallel.world.size > 1:
        found["expert_exposed"] = _rows_exchange(clock, parallel, found, scale)
    found["launches_ahead"] = device.type == "cuda"
    found["ranks_per_processor"] = _ranks_per_processor(parallel)
    rows = parallel.world.all_gather_object(found)
    larger_is_slower = ("latency_s", "product_traffic", "ranks_per_processor", "sharded_exchange", "expert_exposed")
    found = {name: (max if name in larger_is_slower else min)(row[name] for row in rows) for name in found}
    return found | _layers(
        clock, device, Cluster(**{"world_size": 1, "intra_bandwidth": 1e12, "inter_bandwidth": 1e12, **found}), scale
    )


def measure_here() -> dict[str, Any] | None:
    """Joins torchrun's job, if this process is in one, and returns what rank 0 says that `measure` found; None on other ranks."""
    layout = ParallelConfig(tensor_model_parallel_size=launcher.local_world_size())
    is_single = launcher.world_size() == 1
    parallel = single_process_state(prepare_device(layout, None)) if is_single else join_ranks(layout)
    found = measure(parallel)
    if not is_single:
        backend.leave_distributed()
    return found if parallel.rank == 0 else None


def _ranks_per_processor(parallel: ParallelState) -> float:
    """Returns how many ranks of this host take turns on a processor; 1 if each has its own."""
    if parallel.device.type == "cuda":
        return 1.0
    return max(1.0, parallel.tp.size * torch.get_num_threads() / num_cores())


class _Clock:
    """Times work that all ranks do at once."""

    def __init__(self, parallel: ParallelState, rounds: int):
        self.parallel, self.rounds = parallel, rounds

    def seconds(self, work: Callable[[], object]) -> float:
        """Returns the median seconds of doing it, the slowest rank's."""
        work()
        times: list[float] = []
        while len(times) < self.rounds and sum(times) < MOST_S:
            self.parallel.world.barrier()
            began = self._now()
            work()
            times.append(max(self.parallel.world.all_gather_object(self._now() - began)))
        return statistics.median(times)

    def exchange_seconds(
        self, group: Group, exchanges: Sequence[Callable[[], object]], before: Callable[[], object]
    ) -> list[float]:
        """Returns the mean seconds of each of a group's exchanges after other work, as in a step, from when its last rank begins it,
        in the slowest of the groups that exchange at once. They take turns: a link that lets bursts through slows down.

        Where threads of messages and of products take turns on processors, an exchange after products takes several times as
        long as one after a pause, and few take most of the time: a step has the sum of them.
        """
        times: list[list[float]] = [[] for _ in exchanges]
        for exchange in exchanges:
            exchange()
        while len(times[0]) < _EXCHANGES * self.rounds and sum(map(sum, times)) < MOST_S * len(exchanges):
            for exchange, found in zip(exchanges, times, strict=True):
                before()
                began = self._now()
                exchange()
                own = min(group.all_gather_object(self._now() - began))
                found.append(max(self.parallel.world.all_gather_object(own)))
        return list(map(statistics.mean, times))

    def _now(self) -> float:
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize(self.parallel.device)
        return time.perf_counter()


def _multiply(a: torch.Tensor, weights: torch.Tensor) -> None:
    for weight in weights:
        torch.mm(a, weight)


def _products(clock: _Clock, device: torch.device, bandwidth: float, scale: float) -> dict[str, Any]:
    """Returns the rate of large products, and how often products move their operands: a least-squares line through shapes."""
    dtype, side = measured_dtype(device), _SIDE[device.type] * scale
    rows = []
    for shape in _SHAPES:
        m, k, n = (max(1, int(side * part)) for part in shape)
        times = max(1, min(_MOST_PRODUCTS, int(_WEIGHTS[device.type] * scale // (k * n * dtype.itemsize))))
        a, weights = torch.ones(m, k, device=device, dtype=dtype), torch.ones(times, k, n, device=device, dtype=dtype)
        product = Product(m, k, n, dtype.itemsize)
        seconds = clock.seconds(partial(_multiply, a, weights))
        moved = dtype.itemsize * (m * k + k * n + m * n) / bandwidth
        rows.append((product.flops * times / seconds, moved * times / seconds))
    per_flop, traffic = _line(rows)
    return {"flops": 1 / per_flop, "product_traffic": traffic}


def _line(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns (x, y), not below zero, of x a + y b nearest to 1 for all rows (a, b)."""
    table = np.array(rows)
    x, y = np.linalg.lstsq(table, np.ones(len(table)), rcond=None)[0]
    if y <= 0 or x <= 0:
        column = 0 if y <= 0 else 1
        slope = table[:, column].sum() / (table[:, column] ** 2).sum()
        x, y = (slope, 0.0) if column == 0 else (1 / table[:, 0].max(), max(0.0, y))
    return float(x), float(y)


def _attention(clock: _Clock, device: torch.device, scale: float) -> float:
    """Returns the operations per second of attention's core, forwards and backwards."""
    tokens, heads = max(16, int((2048 if device.type == "cuda" else 512) * scale)), 8
    width = ATTENTION_WIDTH if device.type == "cuda" else 64
    q, k, v = (
        torch.ones(2, heads, tokens, width, device=device, dtype=measured_dtype(device), requires_grad=True)
        for _ in range(3)
    )
    seconds = clock.seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward())
    return 3 * 2 * 2 * 2 * heads * width * tokens * tokens / 2 / seconds


def _links(clock: _Clock, parallel: ParallelState, scale: float) -> dict[str, Any]:
    """Returns the bandwidth of each level that the job has, and the latency of a hop; nothing for a job of one rank."""
    found: dict[str, Any] = {}
    for field, group in (("inter_bandwidth", parallel.dp), ("intra_bandwidth", parallel.tp)):
        if group.size > 1:
            found[field], found["latency_s"], sharded = _exchange_speed(clock, group, parallel.device, scale)
            found.setdefault("sharded_exchange", sharded)  # of the link between hosts, where there is one
    for field, other in (("inter_bandwidth", "intra_bandwidth"), ("intra_bandwidth", "inter_bandwidth")):
        if other in found:
            found.setdefault(field, found[other])
    return found


def _products_between(device: torch.device, scale: float) -> Callable[[], None]:
    """Returns the products that are computed before each exchange that is timed."""
    side = max(1, int(_SIDE[device.type] * scale / 2))
    weights = torch.ones(_PRODUCTS_BETWEEN, side, side, device=device, dtype=measured_dtype(device))
    return partial(_multiply, weights[0], weights)


def _exchange_speed(clock: _Clock, group: Group, device: torch.device, scale: float) -> tuple[float, float, float]:
    """Returns (bytes per second, seconds of a hop): the line that fits a group's all-reduces of several sizes best; and
    how many times as long a reduce-scatter and an all-gather take, for the largest size.
    """
    rows, hops = [], (group.size - 1).bit_length()  # a row: bytes sent and hops, both over the seconds taken
    before = _products_between(device, scale)
    for size in _MESSAGES:
        x = torch.zeros(size // 4 // group.size * group.size, device=device)
        ways = (partial(group.all_reduce, x), partial(_reduce_and_gather, group, x))
        seconds, sharded = clock.exchange_seconds(group, ways, before)
        rows.append((2 * size * (group.size - 1) / group.size / seconds, 2 * hops / seconds))
        if seconds > MOST_S / 8:  # a larger one would say no more
            break
    per_byte, latency = _line(rows)
    return 1 / per_byte, latency, sharded / seconds


def _reduce_and_gather(group: Group, x: torch.Tensor) -> None:
    group.all_gather(group.reduce_scatter(x), x)


def _rows_exchange(clock: _Clock, parallel: ParallelState, found: dict[str, Any], scale: float) -> float:
    """Returns how many times as long all ranks take to exchange rows, by the way that experts' tokens go, as `Links` says."""
    device, size = parallel.device, parallel.world.size
    group = with_exchange(parallel.world, device, timeout_s=60.0)
    rows = max(1, int(_ROWS[device.type] * scale) // 1024 // size)
    x = torch.zeros(rows * size, 256, device=device)
    splits = [rows] * size
    exchange = partial(all_to_all_rows, x, splits, splits, group)
    (seconds,) = clock.exchange_seconds(group, [exchange], _products_between(device, scale))
    links = Links(RankGrid(size, ep=size), Cluster(**{"world_size": size, "flops": 1.0, **found}))
    return seconds / links.all_to_all("ep", float(x.nbytes))[0]


def _layers(clock: _Clock, device: torch.device, cluster: Cluster, scale: float) -> dict[str, Any]:
    """Returns what only layers show: hosts' time for a pass, and how often what autograd keeps moves through memory."""
    width, tokens = max(32, int(256 * scale) // 32 * 32), max(16, int(256 * scale))
    found: dict[str, Any] = {}
    for name, experts in (("layer", 0), ("moe", 4)):
        narrow = _model(device, 32, 16, experts)
        per_batch, of_step = _batch_seconds(clock, device, narrow)
        known = _planned_batch(narrow, cluster)
        launch = per_batch if cluster.launches_ahead else max(0.0, per_batch - known)
        found[f"{name}_launch_s"] = launch / narrow.model.num_layers / 2
        found.setdefault("step_s", max(0.0, of_step))
        cluster = _with(cluster, f"{name}_launch_s", found[f"{name}_launch_s"])
        wide = _model(device, width, tokens, experts)
        seconds, _ = _batch_seconds(clock, device, wide)
        traffic = "moe_traffic" if experts else "activation_traffic"
        none, once = (_planned_batch(wide, _with(cluster, traffic, value)) for value in (0.0, 1.0))
        found[traffic] = max(0.0, (seconds - none) / (once - none)) if once > none else 1.0
        cluster = _with(cluster, traffic, found[traffic])
    return found


def _with(cluster: Cluster, field: str, value: Any) -> Cluster:
    return replace(cluster, **{field: value})


def _model(device: torch.device, width: int, tokens: int, experts: int) -> PretrainConfig:
    moe: dict[str, Any] = {"expert_layout": "moe", "num_experts": experts} if experts else {}
    return PretrainConfig(
        model=ModelConfig(num_layers=4, hidden_size=width, num_attention_heads=max(1, width // 64), seq_length=tokens),
        moe=MoEConfig(**moe),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=2, bf16=device.type == "cuda"),
        parallel=ParallelConfig(),
    )


def _with_batches(config: PretrainConfig, number: int) -> PretrainConfig:
    return replace(config, training=replace(config.training, global_batch_size=2 * number))


def _batch_seconds(clock: _Clock, device: torch.device, config: PretrainConfig) -> tuple[float, float]:
    """Returns (seconds of a micro-batch, of a step in addition) from steps of one and of four micro-batches."""
    seconds = []
    for number in (1, 4):
        setup = build_setup(_with_batches(config, number), _VOCABULARY, single_process_state(device))
        shape = (config.training.micro_batch_size, config.model.seq_length)
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(shape, device=device)}
        state, batches = initial_state(setup), [batch] * number
        seconds.append(clock.seconds(partial(train_step, setup, state, batches)))
    one = max(0.0, (seconds[1] - seconds[0]) / 3)
    return one, seconds[0] - one


def _planned_batch(config: PretrainConfig, cluster: Cluster) -> float:
    one, four = (step_cost(_with_batches(config, number), _VOCABULARY, cluster).step_s for number in (1, 4))
    return (four - one) / 3
