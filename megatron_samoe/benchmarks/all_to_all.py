"""Measures the exchange of rows through shared memory against gloo and against copying the same bytes.

Rank processes hold so many megabytes each and send an even (or uneven) part to every rank, themselves included:

    gloo        torch.distributed.all_to_all_single
    rings       shared memory, from an ordinary tensor: two copies, one of them in the cache
    window      shared memory, from rows that were gathered there: one copy
    permuted    permute, then gloo / gather into the window, then exchange (what a dispatch does)
    copy        torch's copy of the same bytes on every rank at once

Variants run in turn; medians of one run, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_samoe.benchmarks.common import add_options
from megatron_samoe.benchmarks.ranks import run_ranks, synchronized
from megatron_samoe.ops.permute import Permutation, permute
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.shm_communicator import ShmCommunicator, create_shm_communicator

WIDTH = 1024


def _splits(num_rows: int, world: int, uneven: bool) -> list[int]:
    """Rows for ranks rank + 1, rank + 2, ... and itself last; uneven: the first gets four times the others' share."""
    shares = [4.0 if uneven and i == 0 else 1.0 for i in range(world)]
    rows = [int(num_rows * share / sum(shares)) for share in shares]
    return [*rows[:-1], num_rows - sum(rows[:-1])]


def _variants(megabytes: float, uneven: bool, communicator: ShmCommunicator) -> dict[str, Callable[[], object]]:
    world, rank = dist.get_world_size(), dist.get_rank()
    num_rows = int(megabytes * 2**20) // (4 * WIDTH)
    splits = _splits(num_rows, world, uneven)
    send = [splits[(to - rank - 1) % world] for to in range(world)]
    receive = [splits[(rank - source - 1) % world] for source in range(world)]
    x = torch.randn(num_rows, WIDTH)
    slots = torch.randperm(num_rows)
    permutation = Permutation(slots, torch.argsort(slots)[:, None], torch.tensor([num_rows]))
    staged = communicator.gathered(x, slots, 1)

    def gloo(rows: torch.Tensor = x) -> None:
        received = rows.new_empty((sum(receive), WIDTH))
        dist.all_to_all_single(received, rows, receive, send)

    return {
        "gloo": gloo,
        "rings": lambda: communicator.exchange(x, send, receive),
        "window": lambda: communicator.exchange(staged, send, receive),
        "permuted, gloo": lambda: gloo(permute(x, permutation)),
        "permuted, window": lambda: communicator.exchange_gathered(x, slots, 1, send, receive),
        "copy": lambda: torch.empty_like(x).copy_(x),
    }


def _measure(options: argparse.Namespace) -> list[dict[str, object]]:
    world = dist.get_world_size()
    group = Group("benchmark", tuple(range(world)), dist.get_rank(), dist.group.WORLD)
    communicator = create_shm_communicator(group)
    assert isinstance(communicator, ShmCommunicator)
    table = []
    for megabytes in options.megabytes:
        variants = _variants(megabytes, options.uneven, communicator)
        # Small exchanges back to back, as a barrier costs more than they do.
        inner = max(1, min(100, int(16 / megabytes)))
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(options.rounds + 1):
            for name, run in variants.items():
                started = synchronized()
                for _ in range(inner):
                    run()
                if number:
                    times[name].append((synchronized() - started) / inner)
        medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        table.append({"ranks": world, "MB": megabytes, **{name: round(ms, 4) for name, ms in medians.items()},
                      "rings / gloo": round(medians["gloo"] / medians["rings"], 2),
                      "window / gloo": round(medians["gloo"] / medians["window"], 2),
                      "permuted, window / permuted, gloo": round(medians["permuted, gloo"] / medians["permuted, window"], 2),
                      "rings / copy": round(medians["copy"] / medians["rings"], 2)})  # fmt: skip
    communicator.close()
    return table


def run(options: argparse.Namespace) -> list[dict[str, object]]:
    """Exchanges of several megabytes a rank, in milliseconds, and ratios."""
    return [row for world in options.ranks for row in run_ranks(_measure, world, options)]


def add_parser(commands: Any) -> None:
    """Adds the subcommand `all-to-all`."""
    parser = commands.add_parser(
        "all-to-all", help="exchanges through shared memory against gloo", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.0625, 1, 16, 64], help="held by each rank")
    parser.add_argument("--uneven", action="store_true", help="four times as much for one other rank")
    add_options(parser, rounds=15, ranks=True)
