"""What several GPUs can show: exchanges equal to torch's bit for bit, their speed, and layouts equal to one process.

    torchrun --nproc-per-node 8 tests/gpu/run_multi_gpu.py

Ranks exchange through NCCL, by the extension, and compute with its CUDA kernels. With --device cpu the same program runs
over shared memory and gloo; so it is tested where there is no GPU. Ends with status 1 and the first difference.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_samoe.config import ParallelConfig
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state import backend
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.exchange import with_exchange
from tests.harness.exchanges import through_torch, world_group
from tests.harness.layout_training import LAYOUTS, MODELS, assert_same, layout_config, train

WIDTH = 1024
RTOL = {"cpu": 1e-5, "cuda": 1e-4}  # a GPU adds matrix products in an order that depends on their sizes


def exchanging_group(device: torch.device) -> Group:
    """Returns the group of all ranks with the extension's exchange; ConfigError where it cannot be had."""
    return with_exchange(world_group(), device, timeout_s=60.0, backend="extension")


def check_exchanges(group: Group, device: torch.device, num_exchanges: int, max_rows: int) -> None:
    """Compares random uneven exchanges, some of empty parts, with torch's."""
    assert group.exchange is not None
    generator = torch.Generator().manual_seed(11)
    for number in range(num_exchanges):
        rows_WW = torch.randint(0, max_rows, (group.size, group.size), generator=generator)
        rows_WW[torch.rand(group.size, group.size, generator=generator) < 0.3] = 0
        send, receive = rows_WW[group.rank].tolist(), rows_WW[:, group.rank].tolist()
        dtype = (torch.float32, torch.bfloat16, torch.int64)[number % 3]
        x = torch.randint(0, 255, (sum(send), (1, 64, 1024)[number % 3])).to(device, dtype)
        got, expected = group.exchange.exchange(x, send, receive), through_torch(x, send, receive)
        assert torch.equal(got, expected), f"exchange {number} of rank {group.rank} differs from torch's"
        pending = group.exchange.start(x, send, receive)
        assert torch.equal(pending.wait(), expected), f"exchange {number}, in the background"


def one_process(models: Sequence[str], device: str) -> dict[str, Any]:
    """Returns the training of one process, to which layouts are compared; to be called outside a process group."""
    return {model: train(layout_config("one process", model), device=device) for model in models}


def check_layouts(expected: dict[str, Any] | None, models: Sequence[str], device: torch.device) -> list[str]:
    """Trains in every layout of this number of ranks and compares on the first rank, which has what is expected.

    Returns what was trained.
    """
    done = []
    for layout in (name for name, (world, _) in LAYOUTS.items() if world == dist.get_world_size()):
        for model in models:
            result = train(layout_config(layout, model), device=device, exchange="extension")
            if expected is not None:
                assert_same(result, expected[model], rtol=RTOL[device.type])
            done.append(f"{model}, {layout}")
    return done


def measure(group: Group, device: torch.device, megabytes: float, repeats: int) -> str:
    """Returns a line with the speed of even exchanges of some megabytes a rank, ours and torch's."""
    exchange = group.exchange
    assert exchange is not None
    rows = [max(int(megabytes * 2**20) // (4 * WIDTH * group.size), 1)] * group.size
    x = torch.randn(sum(rows), WIDTH, device=device)
    ways = {
        "ours": lambda: exchange.exchange(x, rows, rows),
        "ours, even": lambda: exchange.exchange_evenly(x),
        "torch": lambda: through_torch(x, rows, rows),
    }
    seconds = {name: Timer("way()", globals={"way": way}).timeit(repeats).mean for name, way in ways.items()}
    sent = x.nbytes * (group.size - 1) / group.size
    speeds = ", ".join(f"{name} {sent / each / 1e9:.2f}" for name, each in seconds.items())
    return f"{megabytes:g} MB a rank, GB/s sent by each: {speeds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--megabytes", nargs="+", type=float, default=[1, 16, 64, 256])
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    config = ParallelConfig(distributed_backend="nccl" if options.device == "cuda" else "gloo")
    device = backend.choose_device(config)
    backend.set_num_threads(1)
    if device.type == "cuda":
        os.environ.setdefault(extension.CUDA_ENVIRONMENT_VARIABLE, "1")
    expected = one_process(options.models, options.device) if rank == 0 else None
    backend.initialize_distributed(config, device)
    group = exchanging_group(device)
    lines = [f"{group.size} ranks on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}"]
    check_exchanges(group, device, 60, 4000)
    lines.append("60 random exchanges equal torch's bit for bit")
    lines += [measure(group, device, megabytes, 20) for megabytes in options.megabytes]
    lines += [f"trained as one process: {name}" for name in check_layouts(expected, options.models, device)]
    if rank == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
