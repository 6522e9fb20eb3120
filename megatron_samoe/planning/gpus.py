"""Data sheets of GPUs, and the constants of the model of time that published runs on them give.

`python -m tools.planner.fit` fits the constants to runs of some families of models and judges them by others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.planning.cluster import Cluster

Graphs = Literal["", "part", "full"]


@dataclass(frozen=True)
class Gpu:
    """Facts of a data sheet on a GPU and its usual machine.

    Attributes:
        generation: whose products share a constant.
        memory_gb: that tensors may fill, 1e9 bytes: about nine tenths of it.
        flops, flops_8: peak FLOPs per second of dense products in 16 and in 8 bits.
        memory_bandwidth, intra_bandwidth, inter_bandwidth: bytes per second of its memory, and that it sends in each
            direction inside its node and, by one network adapter per GPU, to others.
    """

    generation: str
    memory_gb: float
    flops: float
    flops_8: float
    memory_bandwidth: float
    intra_bandwidth: float
    inter_bandwidth: float
    gpus_per_node: int = 8


GPUS = {
    "H100": Gpu("hopper", 72, 989e12, 1979e12, 3.35e12, 450e9, 50e9),
    "B200": Gpu("blackwell", 165, 2250e12, 4500e12, 8e12, 900e9, 50e9),
    "GB200": Gpu("blackwell", 165, 2500e12, 5000e12, 8e12, 900e9, 50e9, 64),
    "B300": Gpu("blackwell_ultra", 250, 2250e12, 4500e12, 8e12, 900e9, 100e9),
    "GB300": Gpu("blackwell_ultra", 250, 2500e12, 5000e12, 8e12, 900e9, 100e9, 64),
}

#: What `python -m tools.planner.fit` printed; `Cluster` says what each means. `_8_` is products in 8 bits by generation, `mx`
#: what blocks of scales leave of their speed. `unfused`, `launch_*`: kernels launched one by one, with graphs of a layer's parts;
#: `fused`, `graph`: a step that is one CUDA graph.
FITTED: Mapping[str, float] = {
    "efficiency": 0.8,
    "efficiency_8_hopper": 0.6737,
    "efficiency_8_blackwell": 0.5524,
    "efficiency_8_blackwell_ultra": 0.8,
    "mx": 0.9375,
    "attention_efficiency": 0.3502,
    "product_traffic": 1.078,
    "activation_traffic": 5.49,
    "moe_traffic": 3.747,
    "moe_traffic_fused": 1.218,
    "layer_launch_s": 0.0005,
    "moe_launch_s": 0.00605,
    "moe_launch_part_s": 0.004201,
    "tensor_exposed": 0.2373,
    "expert_exposed": 0.26,
    "expert_exposed_fused": 0.5787,
    "spread": 0.36,
}

#: Narrower heads leave a GPU the same exponentials for fewer products. cuDNN's own benchmark on H200 (github.com/NVIDIA/cudnn-frontend,
#: benchmark/sdpa_benchmark_training/results at 3929da2): heads of 64 reach 0.51 to 0.61 of the FLOPs per second of heads of 128.
ATTENTION_WIDTH = 128


def gpu_cluster(
    name: str,
    world_size: int,
    *,
    precision: str = "bf16",
    graphs: Graphs = "",
    overlaps: bool = False,
    overlaps_experts: bool = False,
    sends_once: bool = False,
    expert_row_bytes: float = 0.0,
    constants: Mapping[str, float] = FITTED,
) -> Cluster:
    """Returns a cluster of GPUs of one kind, as fast as published runs are; ConfigError for a GPU that is not known.

    Args:
        precision: of the layers' products: bf16, fp8 or mxfp8.
        graphs: what runs as CUDA graphs: nothing, parts of a layer, or full steps.
        overlaps: exchanges of tensor parallelism overlap with products as in Megatron-Core, weights are gathered during the
            first forward pass, and gradients are summed in 16 bits. NVIDIA's recipes do all of it; this program does none.
        overlaps_experts: exchanges of expert parallelism overlap with another micro-batch's products.
        sends_once, expert_row_bytes: see `Cluster`.
    """
    if name not in GPUS:
        raise ConfigError(
            "--gpu", name, f"must be one of {', '.join(GPUS)}; or give a machine's own figures, by --calibrate"
        )
    gpu, c = GPUS[name], constants
    products = None
    if precision != "bf16":
        share = c[f"efficiency_8_{gpu.generation}"] * (c["mx"] if precision == "mxfp8" else 1.0)
        products = gpu.flops_8 * share / c["efficiency"]
    full = graphs == "full"
    return Cluster(
        world_size,
        gpu.gpus_per_node,
        gpu.memory_gb * 1e9,
        gpu.flops,
        gpu.intra_bandwidth,
        gpu.inter_bandwidth,
        gpu.memory_bandwidth,
        c["efficiency"],
        attention_efficiency=c["attention_efficiency"],
        attention_width=ATTENTION_WIDTH,
        product_flops=products,
        product_traffic=c["product_traffic"],
        activation_traffic=c["activation_traffic"],
        moe_traffic=c["moe_traffic_fused" if full else "moe_traffic"],
        expert_row_bytes=expert_row_bytes,
        layer_launch_s=0.0 if full else c["layer_launch_s"],
        moe_launch_s=0.0 if full else c["moe_launch_part_s" if graphs else "moe_launch_s"],
        tensor_exposed=c["tensor_exposed"] if overlaps else 1.0,
        expert_exposed=c["expert_exposed_fused" if full else "expert_exposed"] if overlaps_experts else 1.0,
        gradient_bytes=2.0 if overlaps else 4.0,
        gathers_ahead=overlaps,
        sends_once=sends_once,
        spread=c.get("spread", 0.0),
    )


def read_measured(path: Path) -> dict[str, Any]:
    """Returns the figures that `plan --calibrate` wrote, by field of `Cluster`.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown name or a wrong value.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("--calibration", str(path), f"cannot be read: {str(error).splitlines()[0]}") from None
    known = {f.name for f in fields(Cluster)} - {"world_size"}
    for name, value in found.items() if isinstance(found, dict) else [("", None)]:
        if name not in known or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(
                "--calibration", str(path), f"holds {name!r}: {value!r}, which plan --calibrate does not write"
            )
    return {str(name): value for name, value in found.items()}


def measured_dtype(device: torch.device) -> torch.dtype:
    """Returns the precision that products are measured in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def measured_cluster(measured: Mapping[str, Any], world_size: int) -> Cluster:
    """Returns a cluster of the machine that was measured; links that were not are as fast as memory, for one rank needs none.

    Raises:
        ConfigError: figures are missing, or several ranks are asked for and no link was measured.
    """
    needed = {"memory_bytes", "flops", "memory_bandwidth"} | ({"inter_bandwidth"} if world_size > 1 else set())
    if missing := sorted(needed - set(measured)):
        words = (
            "start plan --calibrate by torchrun on several ranks"
            if missing == ["inter_bandwidth"]
            else "calibrate anew"
        )
        raise ConfigError("--calibration", ", ".join(missing), f"is missing in the file: {words}")
    links = dict.fromkeys(("intra_bandwidth", "inter_bandwidth"), measured["memory_bandwidth"])
    start = Cluster(world_size, 1, 0, 0, spread=FITTED["spread"], **links)
    return replace(start, **measured)
