"""The exchange of rows through shared memory against gloo and against copying the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_samoe.ops.permute import Permutation, permute
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.shm_communicator import ShmCommunicator, create_shm_communicator
from tools.benchmarks.harness import Rows, TableBenchmark, Variants, medians_of, speed
from tools.benchmarks.ranks import run_ranks, together

WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class AllToAll(TableBenchmark):
    """exchanges through shared memory against gloo

    Rank processes hold so many megabytes each and send an even (or uneven) part to every rank, themselves included:

        gloo        torch.distributed.all_to_all_single
        rings       shared memory, from an ordinary tensor: two copies, one of them in the cache
        window      shared memory, from rows that were gathered there: one copy
        permuted    permute, then gloo / gather into the window, then exchange (what a dispatch does)
        copy        torch's copy of the same bytes on every rank at once

    Medians of one run, in milliseconds.
    """

    name = "all-to-all"

    rounds: int = 15
    """counted rounds; medians are reported"""
    ranks: tuple[int, ...] = (2, 4)
    megabytes: tuple[float, ...] = (0.0625, 1.0, 16.0, 64.0)
    """held by each rank"""
    uneven: bool = False
    """four times as much for one other rank"""

    def rows(self) -> Rows:
        return [row for world in self.ranks for row in run_ranks(self._on_rank, world)]

    def _on_rank(self) -> Rows:
        world = dist.get_world_size()
        communicator = create_shm_communicator(
            Group("benchmark", tuple(range(world)), dist.get_rank(), dist.group.WORLD)
        )
        assert isinstance(communicator, ShmCommunicator)
        rows: Rows = []
        for megabytes in self.megabytes:
            # Small exchanges back to back, as a barrier costs more than they do.
            inner = max(1, min(100, int(16 / megabytes)))
            variants = self._variants(megabytes, communicator)
            repeated = {name: _repeat(run, inner) for name, run in variants.items()}
            medians = medians_of(together(repeated, self.rounds))
            row = {"ranks": world, "MB": megabytes, **{n: round(1e3 * s / inner, 4) for n, s in medians.items()}}
            for ours in ("rings", "window"):
                row |= speed(medians, ours, "gloo")
            row |= speed(medians, "permuted, window", "permuted, gloo") | speed(medians, "rings", "copy")
            rows.append(row)
        communicator.close()
        return rows

    def _variants(self, megabytes: float, communicator: ShmCommunicator) -> Variants:
        world, rank = dist.get_world_size(), dist.get_rank()
        num_rows = int(megabytes * 2**20) // (4 * WIDTH)
        # For ranks rank + 1, rank + 2, ... and itself last; uneven: the first gets four times the others' share.
        shares = [4.0 if self.uneven and i == 0 else 1.0 for i in range(world)]
        splits = [int(num_rows * share / sum(shares)) for share in shares]
        splits[-1] = num_rows - sum(splits[:-1])
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


def _repeat(run: Callable[[], object], count: int) -> Callable[[], None]:
    def runs() -> None:
        for _ in range(count):
            run()

    return runs
