"""Benchmarks of several ranks: processes of one thread each, their model and batches, and the clock of all."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_samoe.config import ParallelConfig, PretrainConfig
from megatron_samoe.parallel_state import ParallelState, backend
from megatron_samoe.runtime.ranks import state_in_layout
from megatron_samoe.training.setup import TrainSetup, build_setup
from tools.benchmarks.harness import Times, Variants, in_turn

VOCAB_SIZE = 512


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """Returns what function(*args) gives on rank 0 of `world_size` processes with one thread each, joined by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank_main, (function, world_size, folder, args), nprocs=world_size)
        return torch.load(f"{folder}/result", weights_only=False)


def _rank_main(rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    backend.keep_freed_memory()
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", f"file://{folder}/store", timedelta(minutes=10), rank=rank, world_size=world_size
        )
    result = function(*args)
    if rank == 0:
        torch.save(result, f"{folder}/result")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def batches_of(setup: TrainSetup) -> list[dict[str, torch.Tensor]]:
    """Returns random micro-batches of one step."""
    shape = (setup.config.training.micro_batch_size, setup.config.model.seq_length)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB_SIZE, shape, generator=generator)
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(shape)}
    return [batch] * setup.num_micro_batches


def make_parallel(config: ParallelConfig, shares_experts: bool = False) -> ParallelState:
    """Returns this rank's groups, whose rows go through what training would take."""
    return state_in_layout(config, torch.device("cpu"), shares_experts)


def make_setup(config: PretrainConfig) -> TrainSetup:
    """Returns the set-up of this rank."""
    return build_setup(config, VOCAB_SIZE, make_parallel(config.parallel, config.moe.shares_experts))


def synchronized() -> float:
    """Returns the time when all ranks are here."""
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter()


def together(variants: Variants, rounds: int) -> Times:
    """Returns the seconds of variants that all ranks run at once; see `in_turn`."""
    return in_turn(variants, rounds, synchronized)
