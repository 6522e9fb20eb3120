"""Save and load throughput of checkpoints against the disk's own, in turn, in one run.

`megatron-samoe benchmark checkpoint --dir DIR [--size-mb 1024] [--json FILE]`. The disk's own is what dd does: one file written in
blocks of 4 MB and flushed with fsync, and read again. The file before is removed only when the new one is complete, as
with checkpoints, and before every writing the system is told to finish what it has to write, also to free what was
removed: else whoever writes first gets places that the disk still has at hand, several times as fast as new ones. Before
every reading the files leave the page cache, so that they come from the disk (on a machine whose disk has a cache of its
own, that one remains).
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.benchmarks.common import Times, Variants, add_alone, forget, in_turn, seconds_of, write_json
from megatron_samoe.cli.arguments import Options
from megatron_samoe.config import CheckpointConfig
from megatron_samoe.dist_checkpointing import saving, store
from megatron_samoe.dist_checkpointing.sharded_state import replicated
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.parallel_state import single_process_state

BLOCK_BYTES = 4 << 20
TENSOR_BYTES = 32 << 20
SETTLE_S = 1.0


def write_plain(path: Path, num_bytes: int) -> None:
    """Writes a file as dd with conv=fsync does."""
    block = os.urandom(BLOCK_BYTES)
    with open(path, "wb", buffering=0) as file:
        for _ in range(num_bytes // BLOCK_BYTES):
            file.write(block)
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    """Reads a file as dd does."""
    block = bytearray(BLOCK_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def settle() -> None:
    """Lets the system finish what it has to write and to free."""
    os.sync()
    time.sleep(SETTLE_S)


class Benchmark:
    """The state that is saved, and one method per thing that is timed."""

    def __init__(self, folder: Path, num_bytes: int):
        self.folder, self.parallel = folder, single_process_state()
        count = max(1, num_bytes // TENSOR_BYTES)
        weights = [torch.randn(TENSOR_BYTES // 4) for _ in range(count)]
        self.state = {f"weight.{i}": replicated(w, self.parallel) for i, w in enumerate(weights)}
        self.num_bytes = count * TENSOR_BYTES
        self.config = CheckpointConfig(save=str(folder / "ours"), load=str(folder / "ours"), keep_last=1)
        self.background = saving.BackgroundSaver(self.parallel, timedelta(minutes=10))
        self.iteration = 0

    def save(self) -> None:
        """Saves, waiting for the disk."""
        self.iteration += 1
        saving.save_checkpoint(
            self.config, self.iteration, self.state, {}, {"iteration": self.iteration}, self.parallel
        )

    def start_saving(self) -> None:
        """What training waits for when saving goes on in the background."""
        self.iteration += 1
        self.background.start(self.config, self.iteration, self.state, {}, {"iteration": self.iteration})

    def load(self) -> None:
        """Looks for the newest checkpoint, verifies its digests, and fills the state, as a resumed run does."""
        found = store.find_checkpoint(self.config, lambda d: store.damaged_files(d, self.parallel))
        assert found is not None
        store.load_checkpoint(found, self.state, self.parallel)

    def run(self, rounds: int) -> Times:
        """Returns seconds of each thing in each round."""
        plain, fresh = self.folder / "plain", self.folder / "plain.new"

        def disk_write() -> float:
            settle()
            seconds = seconds_of(lambda: write_plain(fresh, self.num_bytes))
            fresh.replace(plain)
            return seconds

        def save() -> float:
            settle()
            return seconds_of(self.save)

        def from_disk(read: Callable[[], object]) -> float:
            forget(self.folder)
            return seconds_of(read)

        def start_saving() -> float:
            seconds = seconds_of(self.start_saving)
            self.background.wait()
            return seconds

        ways: Variants = {
            "disk write": disk_write, "save": save, "disk read": lambda: from_disk(lambda: read_plain(plain)),
            "verify and load": lambda: from_disk(self.load), "training waits": start_saving,
        }  # fmt: skip
        return in_turn(ways, rounds)


def run(options: Options) -> int:
    """Saves and loads, prints a table, and returns the exit status."""
    needed = 4 * options.size_mb << 20
    if not options.dir.is_dir() or shutil.disk_usage(options.dir).free < needed:
        print(f"error: --dir {options.dir} must be a folder with {needed / 1e9:.1f} GB free", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        benchmark = Benchmark(Path(folder), options.size_mb << 20)
        seconds = benchmark.run(options.rounds)
    disk = {"save": "disk write", "verify and load": "disk read", "training waits": "disk write"}
    rows, figures = [["", "median s", "MB/s", "share of the disk's"]], {}
    for name, times in seconds.items():
        median = statistics.median(times)
        share = statistics.median(b / t for b, t in zip(seconds[disk.get(name, name)], times, strict=True))
        rows.append([name, f"{median:.2f}", f"{benchmark.num_bytes / median / 1e6:,.0f}", f"{share:.2f}"])
        figures[name] = {"seconds": times, "share_of_disk": share}
    print(f"{benchmark.num_bytes / 1e6:,.0f} MB, medians of {options.rounds} rounds\n{format_table(rows)}")
    write_json(options.json, {"num_bytes": benchmark.num_bytes, "results": figures})
    return 0


def add_parser(commands: Any) -> None:
    """Adds the subcommand `checkpoint`."""
    add = add_alone(commands, "checkpoint", "save and load checkpoints, beside the disk", run, description=__doc__)
    add("--dir", Path, "a folder on the disk in question", required=True)
    add("--size-mb", 1024, "size of the checkpoint")
    add("--rounds", 5)
    add("--json", Path, "write the figures here as well")
