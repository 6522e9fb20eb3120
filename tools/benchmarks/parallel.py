"""Parallel layouts on this machine's CPUs, one process a rank, against what theory or the planner says."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_samoe.config import ParallelConfig, PretrainConfig
from megatron_samoe.moe.router import Router
from megatron_samoe.ops.topk_gate import GateResult
from megatron_samoe.pipeline_parallel.schedule_plan import bubble_fraction, make_plan
from megatron_samoe.planning.gpus import measured_cluster
from megatron_samoe.planning.layout_cost import step_cost
from megatron_samoe.training.machine_speed import measure
from megatron_samoe.training.micro_batches import run_micro_batches
from megatron_samoe.training.setup import TrainSetup, initial_state
from megatron_samoe.training.train_step import micro_batch_context, train_step
from tools.benchmarks.harness import Rows, Run, TableBenchmark, in_turn, medians_of
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


def _step(setup: TrainSetup) -> Run:
    return partial(train_step, setup, initial_state(setup), batches_of(setup))


@dataclass(frozen=True, kw_only=True)
class Bubble(ModelSizes, TableBenchmark):
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
    run_micro_batches(setup, plan, batches, contexts, lambda _, losses: losses.sum() / 1e4)
    timed(synchronized)()  # a stage that is done waits for the other, too
    return time.perf_counter() - started, waited[0]


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
class StepTime(ModelSizes, TableBenchmark):
    """steps in layouts of 1, 2 and 4 ranks against the planner's, which is calibrated for each number in the same run

    The same global batch of 8 micro-batches in each layout. Needs as many idle cores as ranks. Plans assume
    routers that spread tokens evenly, as trained ones nearly do; those measured do so, unless they are `untrained`.
    """

    name = "step-time"

    routers: Literal["even", "untrained"] = "even"
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
                both = {"planned_s": planned, "measured_s": seconds, "planned / measured": planned / seconds}
                rows.append({"model": model, "layout": layout, "ranks": ranks, **both, "load": os.getloadavg()[0]})
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
            setup = make_setup(config)
            if self.routers == "even":
                _spread_evenly(setup.model)
            seconds[model] = medians_of(together({"step": _step(setup)}, self.rounds))["step"]
            gc.collect()
        return seconds


def _spread_evenly(model: nn.Module) -> None:
    """Makes routers choose all experts in turn."""
    for router in model.modules():
        if isinstance(router, Router):
            router.select = partial(_in_turn, router.select, router.score.topk)  # type: ignore[method-assign]


def _in_turn(select: Callable[..., GateResult], topk: int, logits_TE: Tensor, num_sequences: int) -> GateResult:
    tokens, experts = logits_TE.shape
    turn_TK = torch.arange(tokens * topk, device=logits_TE.device).view(tokens, topk) % experts
    return select(logits_TE.scatter(1, turn_TK, 100.0), num_sequences)


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
