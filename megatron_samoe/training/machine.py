"""Where a run ran, for whoever reads its speed later."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from megatron_samoe.ops import cpu_products, extension
from megatron_samoe.parallel_state.state import ParallelState

#: Environment variables that force one of several ways to the same sums, which differ by rounding.
PATHS = (
    "MEGATRON_SAMOE_EXTENSION",
    "MEGATRON_SAMOE_ISA",
    "MEGATRON_SAMOE_BF16_PRODUCTS",
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
)


def machine_facts(parallel: ParallelState) -> dict[str, Any]:
    """Returns device, ranks and software, as plain values; the host's name is not among them."""
    device, grid = parallel.device, parallel.grid
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": device.type,
        "device_name": name,
        "cores": num_cores(),
        "threads_per_rank": torch.get_num_threads(),
        "ranks": grid.world_size,
        "layout": {
            "tensor": grid.tp,
            "context": grid.cp,
            "pipeline": grid.pp,
            "expert": grid.ep,
            "expert_tensor": grid.etp,
            "data": grid.dp,
        },
        "torch": torch.__version__,
        "extension": extension.available(),
        "cuda_kernels": extension.cuda_kernels_in_use(),
        "bf16_products": None if (row := cpu_products.in_use()) is None else row.bf16,
        "forced": {name: os.environ[name] for name in PATHS if name in os.environ},
    }


def num_cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Returns the name of the processor, or of its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
