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

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_samoe.benchmarks.common import Rows, Variants, add_command, add_options, in_turn, medians_of
from megatron_samoe.benchmarks.ranks import run_ranks, synchronized
from megatron_samoe.cli.arguments import Options
from megatron_samoe.ops.permute import Permutation, permute
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.shm_communicator import ShmCommunicator, create_shm_communicator

WIDTH = 1024


def _splits(num_rows: int, world: int, uneven: bool) -> list[int]:
    """Rows for ranks rank + 1, rank + 2, ... and itself last; uneven: the first gets four times the others' share."""
    shares = [4.0 if uneven and i == 0 else 1.0 for i in range(world)]
    rows = [int(num_rows * share / sum(shares)) for share in shares]
    return [*rows[:-1], num_rows - sum(rows[:-1])]


def _variants(megabytes: float, uneven: bool, communicator: ShmCommunicator) -> Variants:
    world, rank = dist.get_world_size(), dist.get_rank()
    num_rows = int(megabytes * 2**20) // (4 * WIDTH)
    splits = _splits(num_rows, world, uneven)
    send = [splits[(to - rank - 1) % world] for to in range(world)]
    receive = [splits[(rank - source - 1) % world] for source in range(world)]
    x = torch.randn(num_rows, WIDTH)
    slots = torch.randperm(num_rows)
    counts_E = torch.tensor([num_rows])
    permutation = Permutation(slots, torch.argsort(slots)[:, None], counts_E, counts_E.int())
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


def _repeat(run: Callable[[], object], count: int) -> None:
    for _ in range(count):
        run()


def _measure(options: Options) -> Rows:
    world = dist.get_world_size()
    group = Group("benchmark", tuple(range(world)), dist.get_rank(), dist.group.WORLD)
    communicator = create_shm_communicator(group)
    assert isinstance(communicator, ShmCommunicator)
    table: Rows = []
    for megabytes in options.megabytes:
        variants = _variants(megabytes, options.uneven, communicator)
        # Small exchanges back to back, as a barrier costs more than they do.
        inner = max(1, min(100, int(16 / megabytes)))
        repeated = {name: partial(_repeat, run, inner) for name, run in variants.items()}
        medians = medians_of(in_turn(repeated, options.rounds, synchronized))
        pairs = (("rings", "gloo"), ("window", "gloo"), ("permuted, window", "permuted, gloo"), ("rings", "copy"))
        table.append({
            "ranks": world, "MB": megabytes, **{name: round(1e3 * s / inner, 4) for name, s in medians.items()},
            **{f"{ours} / {theirs}": round(medians[theirs] / medians[ours], 2) for ours, theirs in pairs},
        })  # fmt: skip
    communicator.close()
    return table


def run(options: Options) -> Rows:
    """Exchanges of several megabytes a rank, in milliseconds, and ratios."""
    return [row for world in options.ranks for row in run_ranks(_measure, world, options)]


def add_parser(commands: Any) -> None:
    """Adds the subcommand `all-to-all`."""
    text = "exchanges through shared memory against gloo"
    add = add_command(commands, "all-to-all", text, run, description=__doc__)
    add("--ranks", [2, 4])
    add("--megabytes", [0.0625, 1.0, 16.0, 64.0], "held by each rank")
    add("--uneven", bool, "four times as much for one other rank")
    add_options(add, rounds=15, ranks=True)
