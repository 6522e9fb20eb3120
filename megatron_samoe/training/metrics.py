"""The record of a step: one flat mapping per logged step, the same keys everywhere.

docs/metrics.md lists the keys; hooks write the record to the console, metrics.jsonl and TensorBoard.
"""

from __future__ import annotations

import resource
import sys

import torch

from megatron_samoe.planning.accounting import forward_flops_per_token, train_flops_per_token
from megatron_samoe.training.hook import Record
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import StepResult, StepTime

#: Dense bf16 matrix rate of known devices, FLOP/s, from their data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Returns the rate of a known CUDA device; None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_FLOPS.items() if all(word in name for word in part.split())), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory this process has held: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def make_record(
    setup: TrainSetup, state: TrainState, result: StepResult, timed: StepTime, epoch_samples: float | None
) -> Record:
    """Returns the record of a step; all ranks call it together.

    Args:
        epoch_samples: samples in which the training data pass once, if they do.
    """
    device = setup.parallel.device
    world = setup.parallel.world
    mine = torch.tensor([[peak_memory_bytes(device), timed.own_s]], dtype=torch.float64, device=device)
    memory_R, own_s_R = world.all_gather(mine).t()
    record: Record = {
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_tokens,
        "global_batch_size": result.batch_size,
        "lm_loss": result.lm_loss,
        **({} if result.kl_loss is None else {"kl_loss": result.kl_loss}),
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "loss_scale": result.loss_scale,
        "skipped": result.skipped,
        "tokens_per_s": timed.tokens_per_s,
        "step_time_s": timed.step_s,
        "peak_memory_bytes": int(memory_R.max()),
    }
    if setup.config.training.spike_window:
        record["spike"] = result.spike is not None
    if world.size > 1:
        record["own_time_mean_s"] = own_s_R.mean().item()
        record["own_time_max_s"] = own_s_R.max().item()
        record["slowest_rank"] = int(own_s_R.argmax())
    if result.routing is not None:
        if result.routing.load_balance_loss is not None:
            record["load_balance_loss"] = result.routing.load_balance_loss
        record["z_loss"] = result.routing.z_loss
        health = result.routing.health
        record["least_load_entropy"] = health.least_load_entropy
        record["largest_expert_share"] = health.largest_expert_share
        record["idle_experts"] = health.idle_experts
        record["dropped_token_fraction"] = health.dropped_fraction
        record |= {name: means[0] if len(means) == 1 else means for name, means in result.routing.others.items()}
    rate = peak_flops(device)
    if rate is not None:
        flops = train_flops_per_token(setup.config, setup.model.vocab_size)
        if setup.teacher is not None:
            taught = setup.teacher.model
            flops += forward_flops_per_token(taught.config, taught.vocab_size)
        record["mfu"] = flops * timed.tokens_per_s / (rate * setup.parallel.world_size)
    if epoch_samples:
        record["epoch"] = state.consumed_samples / epoch_samples
    return record
