"""What parallel benchmarks share: rank processes, their model and batches, and variants that run in turn."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_samoe.config import ModelConfig, MoEConfig, ParallelConfig, PretrainConfig, TrainingConfig
from megatron_samoe.parallel_state import ParallelState, backend, initialize_model_parallel
from megatron_samoe.row_exchange.exchange import with_exchange
from megatron_samoe.training.setup import TrainSetup, build_setup

VOCAB_SIZE = 512


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """Returns what function(*args) gives on rank 0 of `world_size` processes with one thread each, joined by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank_main, (function, world_size, folder, args), nprocs=world_size)
        return torch.load(f"{folder}/result", weights_only=False)


def _rank_main(rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple) -> None:
    backend.keep_freed_memory()
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=10),
        )
    result = function(*args)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def model_config(
    options: argparse.Namespace, layout: str, num_micro_batches: int, dp: int = 1, **moe: Any
) -> PretrainConfig:
    """Returns the benchmark's model; a SaMoE has a bank for four layers unless told otherwise."""
    expert_options = {} if layout == "dense" else {"expert_layout": layout, "num_experts": options.num_experts, **moe}
    if layout != "dense":
        expert_options.setdefault("moe_router_topk", 1)
    if layout == "samoe":
        expert_options.setdefault("num_expert_banks", max(1, options.num_layers // 4))
    return PretrainConfig(
        model=ModelConfig(
            num_layers=options.num_layers, hidden_size=options.hidden_size, num_attention_heads=options.hidden_size // 64,
            seq_length=options.seq_length,
        ),
        moe=MoEConfig(**expert_options),
        training=TrainingConfig(
            micro_batch_size=options.micro_batch_size, global_batch_size=options.micro_batch_size * num_micro_batches * dp
        ),
    )  # fmt: skip


def batches_of(setup: TrainSetup) -> list[dict[str, torch.Tensor]]:
    """Returns random micro-batches of one step."""
    shape = (setup.config.training.micro_batch_size, setup.config.model.seq_length)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB_SIZE, shape, generator=generator)
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(shape)}
    return [batch] * setup.num_micro_batches


def make_parallel(config: ParallelConfig) -> ParallelState:
    """Returns this rank's groups, whose rows go through what training would take."""
    parallel = initialize_model_parallel(config)
    return replace(parallel, ep=with_exchange(parallel.ep, parallel.device, backend=config.moe_all_to_all_backend))


def make_setup(config: PretrainConfig) -> TrainSetup:
    """Returns the set-up of this rank."""
    return build_setup(config, VOCAB_SIZE, make_parallel(config.parallel))


def synchronized() -> float:
    """Returns the time when all ranks are here."""
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


def alternate(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns each variant's seconds in each round; a first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            started = synchronized()
            run()
            if number:
                times[name].append(synchronized() - started)
    return times
