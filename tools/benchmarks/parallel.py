"""Parallel layouts on this machine's CPUs, one process a rank, against what theory or the planner says."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist

from megatron_samoe.config import ParallelConfig, PretrainConfig
from megatron_samoe.gpu_check.tables import as_table
from megatron_samoe.pipeline_parallel.schedule_plan import bubble_fraction, make_plan
from megatron_samoe.planning.gpus import measured_cluster
from megatron_samoe.planning.layout_cost import step_cost
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.training.machine_speed import measure
from megatron_samoe.training.micro_batches import run_micro_batches
from megatron_samoe.training.setup import TrainSetup, initial_state
from megatron_samoe.training.train_step import micro_batch_context, train_step
from tools.benchmarks.harness import Benchmark, Row, Rows, Run, in_turn, medians_of, ratios_of_rounds
from tools.benchmarks.models import ModelSizes
from tools.benchmarks.ranks import VOCAB_SIZE, batches_of, make_parallel, make_setup, run_ranks, synchronized, together

Layout = Literal["pp2", "ep2", "dp2 zero", "tp2"]
LAYOUTS: dict[Layout, ParallelConfig] = {
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "ep2": ParallelConfig(expert_model_parallel_size=2),
    "dp2 zero": ParallelConfig(use_distributed_optimizer=True),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
}
#: What is compared: layout of the experts, and how a SaMoE combines its banks.
MODELS = {"moe": ("moe", None), "samoe step": ("samoe", "step"), "samoe layer": ("samoe", "layer")}
#: Other ways of sharing, by the options that they take; each layer has as many experts to choose from as the MoE's.
WAYS: dict[str, dict[str, Any]] = {
    "tied": {"expert_sharing": "tied"},
    "scaled": {"expert_sharing": "scaled"},
    "pool": {"expert_sharing": "pool", "moe_router_score_function": "norm"},
    "neighbours": {"expert_sharing": "neighbours"},
}


@dataclass(frozen=True, kw_only=True)
class ParallelBenchmark(ModelSizes, Benchmark):
    """One over ranks, whose JSON file holds the rows alone."""

    rounds: int = 5
    """counted rounds; medians are reported"""

    def rows(self) -> Rows:
        """Measures."""
        raise NotImplementedError

    def run(self) -> None:
        rows = self.rows()
        print(as_table(rows))
        self.write_json(rows)

    def on_two_ranks(
        self, layout: Layout, experts: str, num_micro_batches: int | None = None, **moe: Any
    ) -> PretrainConfig:
        """Returns a model on two ranks that take 8 micro-batches together, or so many each."""
        parallel = LAYOUTS[layout]
        dp = 2 // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
        return replace(self.config(experts, num_micro_batches or 8 // dp, dp, **moe), parallel=parallel)


def _step(setup: TrainSetup) -> Run:
    return partial(train_step, setup, initial_state(setup), batches_of(setup))


@dataclass(frozen=True, kw_only=True)
class Bubble(ParallelBenchmark):
    """idle share of a pipeline's passes against (pp - 1) / (chunks * micro-batches + pp - 1): two stages, mean over both"""

    name = "bubble"

    micro_batches: tuple[int, ...] = (2, 4, 8, 16)

    def rows(self) -> Rows:
        rows: Rows = run_ranks(self._on_rank, 2)
        return rows

    def _on_rank(self) -> Rows:
        setups = {}
        for chunks, number in ((chunks, number) for chunks in (1, 2) for number in self.micro_batches):
            if chunks == 1 or number % 2 == 0:
                per_stage = self.num_layers // 4 if chunks > 1 else None
                split = ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=per_stage)
                setups[chunks, number] = make_setup(replace(self.config("dense", number), parallel=split))

        def idle_share(setup: TrainSetup) -> float:
            pair = torch.tensor(_one_pipeline(setup), dtype=torch.float64)
            dist.all_reduce(pair)
            return float(pair[1] / pair[0])

        shares = in_turn({str(key): partial(idle_share, setup) for key, setup in setups.items()}, self.rounds)
        return [
            {
                "schedule": "1f1b" if chunks == 1 else f"interleaved x{chunks}",
                "micro_batches": number,
                "idle_measured": statistics.median(values),
                "idle_in_theory": bubble_fraction(2, chunks, number),
            }
            for (chunks, number), values in zip(setups, shares.values(), strict=True)
        ]


def _one_pipeline(setup: TrainSetup) -> tuple[float, float]:
    """Runs a step's passes; returns this rank's seconds, and those it waited for other stages."""
    channel, waited = setup.pipeline.channel, [0.0]
    assert channel is not None
    batches, state = batches_of(setup), initial_state(setup)

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            waited[0] += time.perf_counter() - started
            return result

        return run

    cls = type(channel)
    channel.take, channel.finish = timed(cls.take.__get__(channel)), timed(cls.finish.__get__(channel))  # type: ignore[method-assign]
    pipeline = setup.pipeline
    plan = make_plan("1f1b", pipeline.size, pipeline.rank, pipeline.num_chunks, len(batches))
    contexts = [micro_batch_context(setup, state, number) for number in range(len(batches))]
    setup.buffers.zero(len(batches))
    setup.model.begin_step()
    started = synchronized()
    run_micro_batches(setup, plan, batches, contexts, lambda _n, _b, losses: losses.sum() / 1e4)
    timed(synchronized)()  # a stage that is done waits for the other, too
    return time.perf_counter() - started, waited[0]


@dataclass(frozen=True, kw_only=True)
class Overhead(ParallelBenchmark):
    """steps of every way of sharing against the standard MoE with as many candidates: 8 micro-batches on two ranks"""

    name = "overhead"

    layouts: tuple[Layout, ...] = ("pp2", "ep2")

    def rows(self) -> Rows:
        return [row for layout in self.layouts for row in run_ranks(self._on_rank, 2, layout)]

    def _on_rank(self, layout: Layout) -> Rows:
        configs = {
            model: self.on_two_ranks(layout, experts, 8, samoe_combine=combine)
            for model, (experts, combine) in MODELS.items()
        }
        for way, moe in WAYS.items():
            own = self.num_experts // 2 if way == "neighbours" else self.num_experts  # of two layers
            configs[way] = self.on_two_ranks(layout, "moe", 8, **moe, num_experts=own)
        times = together({model: _step(make_setup(config)) for model, config in configs.items()}, self.rounds)
        medians = medians_of(times)
        return [
            {
                "layout": layout,
                "model": model,
                "step_s": medians[model],
                "ratio_of_medians": medians[model] / medians["moe"],
                "median_of_ratios": statistics.median(ratios_of_rounds(times, model, "moe")),
            }
            for model in times
        ]


@dataclass(frozen=True, kw_only=True)
class Memory(ParallelBenchmark):
    """bytes per expert parameter of the standard MoE's rank, by part, in PP 2 x EP 2 with and without more data parallelism"""

    name = "memory"

    world_sizes: tuple[int, ...] = (4, 8)
    """multiples of 4"""

    def rows(self) -> Rows:
        expert = 2 * 4 * self.hidden_size**2 + 4 * self.hidden_size + self.hidden_size
        standard = self.num_layers // 2 * (self.num_experts // 2) * expert
        rows: Rows = []
        for world_size in self.world_sizes:
            edp = world_size // 4
            results: dict[tuple[str, bool], Row] = run_ranks(self._on_rank, world_size, world_size)
            for (model, zero), result in results.items():
                parts = {part: size / standard for part, size in result["measured"].items()}
                share = result["config"].moe.num_expert_banks / self.num_layers
                formula = formula_bytes(*MODELS[model], share, 2, edp if zero else 1, 2 * edp)
                measured = sum(parts.values())
                rows.append(
                    {
                        "model": model,
                        "ranks": world_size,
                        "zero": zero,
                        **parts,
                        "measured": measured,
                        "formula": formula,
                        "ratio": measured / formula,
                        "planned_total_mb": result["planned"].total / 1e6,
                        "rss_mb": result["rss_bytes"] / 1e6,
                    }
                )
        return rows

    def _on_rank(self, world_size: int) -> dict[tuple[str, bool], Row]:
        return {(model, zero): self._one(model, zero, world_size) for zero in (False, True) for model in MODELS}

    def _one(self, model: str, zero: bool, world_size: int) -> Row:
        gc.collect()
        process = psutil.Process()
        before = process.memory_info().rss
        layout, combine = MODELS[model]
        config = self.config(layout, 2, world_size // 2, samoe_combine=combine)
        parallel = ParallelConfig(
            pipeline_model_parallel_size=2, expert_model_parallel_size=2, use_distributed_optimizer=zero
        )
        config = replace(config, parallel=parallel, training=replace(config.training, bf16=True))
        setup = make_setup(config)
        inside: Row = {}

        def observe() -> None:
            inside["rss_bytes"] = process.memory_info().rss - before
            inside["measured"] = {part: _num_bytes(tensors) for part, tensors in _expert_tensors(setup).items()}

        train_step(setup, initial_state(setup), batches_of(setup), observe)
        return {**inside, "planned": rank_memory(config, VOCAB_SIZE, world_size, 0), "config": config}


def _expert_tensors(setup: TrainSetup) -> dict[str, list[torch.Tensor]]:
    """Returns what this rank holds for routed experts, by part."""
    parameters, optimizer = setup.model.global_parameters(), setup.optimizer
    names = [n for n in parameters if n.startswith("expert_pool.") or ".moe.experts." in n]
    own_masters, state = optimizer.own_masters(), []
    for name in (n for n in names if n in optimizer.masters):
        state += [*optimizer.moments(name).values(), *([own_masters[name]] if name in own_masters else [])]
    lenders = setup.model.lender.lenders.values()  # type: ignore[attr-defined]
    kept = [getattr(one, part, None) for one in lenders for part in ("_weights", "_grads", "_banks")]
    return {
        "weights": [parameters[n].detach() for n in names],
        "gradients": [parameters[n].main_grad for n in names],  # type: ignore[attr-defined]
        "optimizer": state,
        "folded or gathered": [t for weights in kept if weights is not None for _, t in weights.items()],
    }


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Returns the bytes of the elements; tensors that lie in one buffer count their own part."""
    return sum(t.numel() * t.element_size() for t in {(t.data_ptr(), t.numel()): t for t in tensors}.values())


def formula_bytes(
    layout: str, combine: str | None, share: float, stages: int, state_shards: int, pool_shards: int
) -> float:
    """Returns bytes per expert parameter that a standard MoE's stage would have (bf16, g = 4): see docs/parallelism.md.

    Args:
        share: banks over layers (P/L) of the whole model.
        stages: pipeline stages, each with as many MoE layers.
        state_shards, pool_shards: ranks that share optimizer state out with ZeRO-1, and the pool.
    """
    if layout == "moe":
        return 2 + 4 + 12 / state_shards
    own = 16 * share * stages / pool_shards
    if combine == "step":
        return 2 + 4 + own
    return own + share * stages * 8


#: Layouts of steps that are planned and measured: ranks, and how these divide a model.
STEP_LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "one": (1, ParallelConfig()),
    **{name: (2, layout) for name, layout in LAYOUTS.items()},
    "dp4 zero": (4, ParallelConfig(use_distributed_optimizer=True)),
    "ep4": (4, ParallelConfig(expert_model_parallel_size=4)),
    "pp2 dp2": (4, ParallelConfig(pipeline_model_parallel_size=2)),
    "tp2 pp2": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}


@dataclass(frozen=True, kw_only=True)
class StepTime(ParallelBenchmark):
    """steps in layouts of 1, 2 and 4 ranks against the planner's, which is calibrated for each number in the same run

    The same global batch of 8 micro-batches in each layout. Needs as many idle cores as ranks.
    """

    name = "step-time"

    layouts: tuple[str, ...] = tuple(STEP_LAYOUTS)
    models: tuple[str, ...] = ("dense", *MODELS, *WAYS)

    def rows(self) -> Rows:
        rows: Rows = []
        for layout in sorted(self.layouts, key=lambda name: STEP_LAYOUTS[name][0]):
            ranks, parallel = STEP_LAYOUTS[layout]
            if not rows or rows[-1]["ranks"] != ranks:
                cluster = measured_cluster(run_ranks(_calibrate, ranks, ranks), ranks)
            models = [m for m in self.models if m != "dense" or parallel.expert_model_parallel_size == 1]
            configs = {model: self._config(model, ranks, parallel) for model in models}
            for model, seconds in run_ranks(self._seconds, ranks, configs).items():
                planned = step_cost(configs[model], VOCAB_SIZE, cluster).step_s
                rows.append(
                    {
                        "model": model,
                        "layout": layout,
                        "ranks": ranks,
                        "planned_s": planned,
                        "measured_s": seconds,
                        "planned / measured": planned / seconds,
                        "load": os.getloadavg()[0],
                    }
                )
            print(f"{layout}: measured", file=sys.stderr, flush=True)
        print(step_time_verdict(rows))
        return rows

    def _config(self, model: str, ranks: int, parallel: ParallelConfig) -> PretrainConfig:
        experts, combine = MODELS.get(model, ("dense" if model == "dense" else "moe", None))
        dp = ranks // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
        config = self.config(experts, 8 // dp, dp, **(WAYS.get(model) or {"samoe_combine": combine}))
        return replace(config, parallel=parallel)

    def _seconds(self, configs: dict[str, PretrainConfig]) -> dict[str, float]:
        seconds = {}
        for model, config in configs.items():
            seconds[model] = medians_of(together({"step": _step(make_setup(config))}, self.rounds))["step"]
            gc.collect()
        return seconds


def _calibrate(ranks: int) -> dict[str, Any]:
    """Returns the figures of this machine for so many ranks at once."""
    return measure(make_parallel(ParallelConfig(tensor_model_parallel_size=ranks)))


def step_time_verdict(rows: Rows) -> str:
    """Returns the median error, and for how many models and numbers of ranks the fastest layout is among the first two planned."""
    off = statistics.median(abs(row["planned / measured"] - 1) for row in rows)
    groups: dict[tuple[str, int], Rows] = {}
    for row in rows:
        groups.setdefault((row["model"], row["ranks"]), []).append(row)
    several = [group for group in groups.values() if len(group) > 2]
    hits = sum(
        min(group, key=lambda row: row["measured_s"]) in sorted(group, key=lambda row: row["planned_s"])[:2]
        for group in several
    )
    return f"median error {off:.0%}; the fastest is among the first two planned for {hits} of {len(several)}\n"
