"""Measures parallel layouts on this machine's CPUs, one process a rank, against what theory or the planner says.

    bubble     idle share of a pipeline's passes against (pp - 1) / (chunks * micro-batches + pp - 1)
    overhead   optimizer steps of each way of sharing against the standard MoE with as many candidates and active parameters
    memory     bytes per rank by part, MoE against SaMoE with a quarter of the expert parameters
    step-time  steps in several layouts against the planner's model, calibrated in the same run

Variants run in turn, and medians are reported, so that other load meets them alike. Only ratios of one run count.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_samoe.benchmarks.common import (
    Row,
    Rows,
    add_alone,
    add_sizes,
    as_table,
    in_turn,
    medians_of,
    model_config,
    write_json,
)
from megatron_samoe.benchmarks.ranks import VOCAB_SIZE, batches_of, make_setup, run_ranks, synchronized
from megatron_samoe.cli.arguments import Options
from megatron_samoe.config import ParallelConfig, PretrainConfig
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.pipeline_parallel.schedule_plan import bubble_fraction, make_plan
from megatron_samoe.planning.accounting import train_flops_per_token
from megatron_samoe.planning.layout_cost import Cluster, step_cost
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.training.micro_batches import run_micro_batches
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.train_step import micro_batch_context, train_step

LAYOUTS = {
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


def one_pipeline(setup: TrainSetup) -> tuple[float, float]:
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


def _bubbles(options: Options) -> Rows:
    setups = {}
    for chunks in (1, 2):
        for number in options.micro_batches:
            if chunks > 1 and number % 2:
                continue
            per_stage = options.num_layers // 4 if chunks > 1 else None
            parallel = ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=per_stage)
            setups[chunks, number] = make_setup(replace(model_config(options, "dense", number), parallel=parallel))

    def idle_share(setup: TrainSetup) -> float:
        pair = torch.tensor(one_pipeline(setup), dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(pair)
        return float(pair[1] / pair[0])

    shares = in_turn({str(key): partial(idle_share, setup) for key, setup in setups.items()}, options.rounds)
    return [
        {
            "schedule": "1f1b" if chunks == 1 else f"interleaved x{chunks}", "micro_batches": number,
            "idle_measured": statistics.median(values), "idle_in_theory": bubble_fraction(2, chunks, number),
        }
        for (chunks, number), values in zip(setups, shares.values(), strict=True)
    ]  # fmt: skip


def bubble(options: Options) -> Rows:
    """Idle share of two stages, mean over both."""
    rows: Rows = run_ranks(_bubbles, 2, options)
    return rows


def _on_two_ranks(
    options: Options, name: str, layout: str, num_micro_batches: int | None = None, **moe: Any
) -> PretrainConfig:  # fmt: skip
    """Returns a model on two ranks that take 8 micro-batches together, or so many each."""
    parallel = LAYOUTS[name]
    dp = 2 // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)
    config = model_config(options, layout, num_micro_batches or 8 // dp, dp, **moe)
    return replace(config, parallel=parallel)


def _step(setup: TrainSetup) -> Callable[[], object]:
    return partial(train_step, setup, initial_state(setup), batches_of(setup))


def _overhead(options: Options, name: str) -> Rows:
    variants = {
        model: _step(make_setup(_on_two_ranks(options, name, layout, 8, samoe_combine=combine)))
        for model, (layout, combine) in MODELS.items()
    }
    for way, moe in WAYS.items():
        layers = moe.get("num_neighbour_layers", 1)  # which bring their experts into one set
        own = options.num_experts // layers
        variants[way] = _step(make_setup(_on_two_ranks(options, name, "moe", 8, **moe, num_experts=own)))
    times = in_turn(variants, options.rounds, synchronized)
    medians = medians_of(times)
    return [
        {
            "layout": name, "model": model, "step_s": medians[model],
            "ratio_of_medians": medians[model] / medians["moe"],
            "median_of_ratios": statistics.median(a / b for a, b in zip(values, times["moe"], strict=True)),
        }
        for model, values in times.items()
    ]  # fmt: skip


def overhead(options: Options) -> Rows:
    """Steps of 8 micro-batches on two ranks, of every way of sharing."""
    return [row for name in options.layouts for row in run_ranks(_overhead, 2, options, name)]


def expert_tensors(setup: TrainSetup) -> dict[str, list[torch.Tensor]]:
    """Returns what this rank holds for routed experts, by part."""
    names = [n for n in setup.model.global_parameters() if n.startswith("expert_pool.") or ".moe.experts." in n]
    parameters, optimizer = setup.model.global_parameters(), setup.optimizer
    pieces = [n for n in names if n in optimizer.masters]
    own_masters = optimizer.own_masters()
    lenders = setup.model.lender.lenders.values()  # type: ignore[attr-defined]
    kept = [getattr(one, part, None) for one in lenders for part in ("_weights", "_grads", "_banks")]
    return {
        "weights": [parameters[n].detach() for n in names],
        "gradients": [parameters[n].main_grad for n in names],  # type: ignore[attr-defined]
        "optimizer": [t for n in pieces for t in [*optimizer.moments(n).values(), *([own_masters[n]] if n in own_masters else [])]],
        "folded or gathered": [t for weights in kept if weights is not None for _, t in weights.items()],
    }  # fmt: skip


def num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Returns the bytes of the elements; tensors that lie in one buffer count their own part."""
    return sum(t.numel() * t.element_size() for t in {(t.data_ptr(), t.numel()): t for t in tensors}.values())


def _memory(options: Options, model: str, zero: bool, world_size: int) -> Row:
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    layout, combine = MODELS[model]
    config = model_config(options, layout, 2, world_size // 2, samoe_combine=combine)
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, expert_model_parallel_size=2, use_distributed_optimizer=zero
    )
    config = replace(config, parallel=parallel, training=replace(config.training, bf16=True))
    setup = make_setup(config)
    inside: Row = {}

    def observe() -> None:
        inside["rss_bytes"] = process.memory_info().rss - before
        inside["measured"] = {part: num_bytes(tensors) for part, tensors in expert_tensors(setup).items()}

    train_step(setup, initial_state(setup), batches_of(setup), observe)
    return {**inside, "planned": rank_memory(config, VOCAB_SIZE, world_size, 0), "config": config}


def _memories(options: Options, world_size: int) -> dict[tuple[str, bool], Row]:
    return {(model, zero): _memory(options, model, zero, world_size) for zero in (False, True) for model in MODELS}


def formula_bytes(
    layout: str, combine: str | None, share: float, stages: int, state_shards: int, pool_shards: int
) -> float:  # fmt: skip
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


def memory(options: Options) -> Rows:
    """PP 2 x EP 2, with and without more data-parallel ranks; bytes per expert parameter of the standard MoE's rank."""
    rows: Rows = []
    expert = 2 * 4 * options.hidden_size**2 + 4 * options.hidden_size + options.hidden_size
    standard = options.num_layers // 2 * (options.num_experts // 2) * expert
    for world_size in options.world_sizes:
        edp = world_size // 4
        for (model, zero), result in run_ranks(_memories, world_size, options, world_size).items():
            parts = {part: count / standard for part, count in result["measured"].items()}
            share = result["config"].moe.num_expert_banks / options.num_layers
            formula = formula_bytes(*MODELS[model], share, 2, edp if zero else 1, 2 * edp)
            measured = sum(parts.values())
            rows.append({
                "model": model, "ranks": world_size, "zero": zero, **parts, "measured": measured, "formula": formula,
                "ratio": measured / formula, "planned_total_mb": result["planned"].total / 1e6,
                "rss_mb": result["rss_bytes"] / 1e6,
            })  # fmt: skip
    return rows


def _calibrate(size: int = 1 << 21) -> float:
    """Returns bytes per second of an all-reduce of 8 MB between two ranks (each sends its size once)."""
    times = in_turn({"all-reduce": partial(_reduce, torch.ones(size))}, 5, synchronized)
    return size * 4 / statistics.median(times["all-reduce"])


def _reduce(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor)


def _step_seconds(options: Options, name: str | None, model: str) -> tuple[float, float]:
    """Returns the median seconds of a step, and the bandwidth between ranks."""
    if name is None:
        setup = build_setup(model_config(options, model, 8), VOCAB_SIZE, single_process_state())
    else:
        setup = make_setup(_on_two_ranks(options, name, model))
    seconds = medians_of(in_turn({"step": _step(setup)}, options.rounds, synchronized))["step"]
    return seconds, 0.0 if name is None else _calibrate()


def step_time(options: Options) -> Rows:
    """The same global batch of 8 micro-batches in each layout; products' speed from one rank, links' from an all-reduce."""
    rows: Rows = []
    for model in ("moe", "samoe"):
        alone, _ = run_ranks(_step_seconds, 1, options, None, model)
        config = model_config(options, model, 8)
        tokens = 8 * config.training.micro_batch_size * config.model.seq_length
        flops = tokens * train_flops_per_token(config, VOCAB_SIZE)
        for name in options.layouts:
            seconds, bandwidth = run_ranks(_step_seconds, 2, options, name, model)
            cluster = Cluster(2, 2, 1e12, flops / alone, bandwidth, bandwidth, memory_bandwidth=5e9, efficiency=1.0,
                              latency_s=2e-4)  # fmt: skip
            planned = step_cost(_on_two_ranks(options, name, model), VOCAB_SIZE, cluster)
            rows.append({
                "model": model, "layout": name, "one_rank_s": alone, "measured_s": seconds, "model_s": planned.step_s,
                "model/measured": planned.step_s / seconds, "gb_per_s": bandwidth / 1e9,
            })  # fmt: skip
    return rows


RUNS = {"bubble": bubble, "overhead": overhead, "memory": memory, "step-time": step_time}


def run(options: Options) -> None:
    """Runs one benchmark, prints its table, and saves the rows if that is asked for."""
    rows = RUNS[options.what](options)
    print(as_table(rows))
    write_json(options.json, rows)


def add_parser(commands: Any) -> None:
    """Adds the subcommand `parallel`."""
    parser = commands.add_parser(
        "parallel", help="parallel layouts against theory and the planner", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parts = parser.add_subparsers(dest="what", required=True)
    for name, part in RUNS.items():
        add = add_alone(parts, name, (part.__doc__ or "").splitlines()[0], run)
        add_sizes(add, num_layers=8, hidden_size=256, seq_length=128, micro_batch_size=4, num_experts=8)
        add("--rounds", 5, "counted rounds; medians are reported")
        add("--json", Path, "also write the results there")
        if name == "bubble":
            add("--micro-batches", [2, 4, 8, 16])
        if name in ("overhead", "step-time"):
            add("--layouts", [tuple(LAYOUTS)], default=["pp2", "ep2"] if name == "overhead" else list(LAYOUTS))
        if name == "memory":
            add("--world-sizes", [4, 8], "multiples of 4")
