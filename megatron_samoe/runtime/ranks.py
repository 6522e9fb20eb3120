"""The start of this process as a rank of a job: device, threads, groups, and transport of tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.parallel_state import backend, launcher
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.parallel_state.state import ParallelState, initialize_model_parallel
from megatron_samoe.row_exchange.exchange import with_exchange
from megatron_samoe.runtime.gpu import check_gpu


def place_in(layout: ParallelConfig, device: torch.device, shares_experts: bool = False) -> ParallelState:
    """Returns the place of this rank, which has joined its job, in a layout, with the transport of tokens to other
    ranks' experts.

    Args:
        shares_experts: whether holders of shared experts exchange them every step, which shared memory is good for as well.
    """
    parallel = initialize_model_parallel(layout, device)
    timeout_s, backend = 60.0 * layout.distributed_timeout_minutes, layout.moe_all_to_all_backend
    ep = with_exchange(parallel.ep, device, timeout_s, backend, layout.moe_hierarchical_all_to_all)
    pool_dp = parallel.pool_dp
    if shares_experts and device.type == "cpu" and backend != "torch":
        pool_dp = with_exchange(pool_dp, device, timeout_s)
    return replace(parallel, ep=ep, pool_dp=pool_dp)


def join_ranks(layout: ParallelConfig, num_threads: int | None = None) -> ParallelState:
    """Joins torchrun's job, if this process is in one, and returns this rank's place in a layout.

    Args:
        num_threads: CPU threads of this rank; the host's cores divided by its ranks if not given.

    Raises:
        ConfigError: the layout does not fill the ranks; raised before any rank waits for another.
    """
    try:
        RankGrid.of(layout, launcher.world_size())
    except ValueError as error:
        sizes = (
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.expert_model_parallel_size,
            layout.expert_tp,
        )
        given = ", ".join(f"{axis} {size}" for axis, size in zip(("tp", "pp", "ep", "etp"), sizes, strict=True))
        raise ConfigError(
            "layout", given, f"must divide the {launcher.world_size()} processes that were started: {error}"
        ) from None
    device = backend.choose_device(layout)
    check_gpu(device)
    backend.set_num_threads(num_threads)
    backend.initialize_distributed(layout, device)
    return place_in(layout, device)
