"""The start of this process as a rank of a job: a device that can do what is asked, threads, groups, and transport of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import torch

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state import backend, launcher
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.parallel_state.state import ParallelState, initialize_model_parallel
from megatron_samoe.row_exchange.exchange import with_exchange


def prepare_device(layout: ParallelConfig, num_threads: int | None, bf16: bool = False) -> torch.device:
    """Returns this rank's device, checked, and sets its CPU threads; the host's cores over its ranks if None.

    Raises:
        ConfigError: see `check_gpu`.
    """
    device = backend.choose_device(layout)
    check_gpu(device, bf16)
    backend.set_num_threads(num_threads)
    return device


def state_in_layout(layout: ParallelConfig, device: torch.device, shares_experts: bool = False) -> ParallelState:
    """Returns the parallel state of this rank, which has joined its job, in a layout, with the transport of tokens to other
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
    """Joins torchrun's job, if this process is in one, and returns this rank's parallel state in a layout.

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
    device = prepare_device(layout, num_threads)
    backend.initialize_distributed(layout, device)
    return state_in_layout(layout, device)


def check_gpu(device: torch.device, bf16: bool = False) -> None:
    """Checks that torch, our kernels and the precision fit this rank's GPU; a CPU always fits.

    Raises:
        ConfigError: the GPU has no bf16 and that is asked for, or torch or the kernels in use hold no code for it. Other
            ranks may have other GPUs, so the error is this rank's.
    """
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} ({device}, compute capability {capability[0]}.{capability[1]})"
    torch_archs = torch.cuda.get_arch_list()
    if torch_archs and not has_code(torch_archs, capability):
        raise ConfigError(
            "torch",
            torch.__version__,
            f"has no code for {name}, only for {', '.join(torch_archs)}; install a torch that is built for this GPU",
            collective=False,
        )
    if bf16 and capability < (8, 0):
        allowed = f"needs compute capability 8.0 or more, and this is {name}; use --fp16 or fp32 there"
        raise ConfigError("--bf16", True, allowed, collective=False)
    if not extension.cuda_kernels_are_chosen() and extension.cuda_kernels_in_use():
        archs = extension.build_info()["cuda_archs"]
        if not has_code(_as_torch_names(archs), capability):
            wanted = ";".join([*archs, f"{capability[0]}.{capability[1]}"])
            raise ConfigError(
                extension.CUDA_ENVIRONMENT_VARIABLE,
                "1",
                f"asks for kernels that were compiled for {', '.join(archs)} and not for {name}: build them again with "
                f"TORCH_CUDA_ARCH_LIST='{wanted}', or leave the variable at 0 for torch's",
                collective=False,
            )


def has_code(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Returns whether code for these architectures runs on a GPU: sm_80 on 8.x from 8.0 on, sm_90a on 9.0 only, and
    compute_80, which the driver compiles, on all from 8.0 on.
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        kind, own, exact = match[1], (int(match[2]), int(match[3])), match[4] == "a"
        if own == capability or (not exact and own < capability and (kind == "compute" or own[0] == capability[0])):
            return True
    return False


def _as_torch_names(archs: Iterable[str]) -> list[str]:
    """Returns architectures as torch lists them, from TORCH_CUDA_ARCH_LIST's 9.0+PTX."""
    names = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        names.append(f"sm_{number}")
        if arch.endswith("+PTX"):
            names.append(f"compute_{number}")
    return names
