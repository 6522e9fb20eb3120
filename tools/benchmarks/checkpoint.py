"""Save and load throughput of checkpoints against the disk's own, and against the page cache's."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from megatron_samoe.config import CheckpointConfig
from megatron_samoe.dist_checkpointing import loading, saving, store
from megatron_samoe.dist_checkpointing.sharded_state import replicated
from megatron_samoe.dist_checkpointing.store import Problems
from megatron_samoe.errors import ConfigError
from megatron_samoe.parallel_state import single_process_state
from tools.benchmarks.harness import Rows, Run, TableBenchmark, Variants, forget, in_turn, ratios_of_rounds, seconds_of

BLOCK_BYTES = 4 << 20
TENSOR_BYTES = 32 << 20
SETTLE_S = 1.0
#: What each thing is compared with.
PLAIN = {
    "save": "disk write",
    "training waits": "disk write",
    "verify and load": "disk read",
    "verify and load, cached": "page cache read",
}


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchmark(TableBenchmark):
    """save and load checkpoints, beside the disk

    The disk's own is what dd does: one file written in blocks of 4 MB and flushed with fsync, and read again. The file
    before is removed only when the new one is complete, as with checkpoints, and before every writing the system is told to
    finish what it has to write, also to free what was removed: else whoever writes first gets places that the disk still
    has at hand, several times as fast as new ones. Before every reading the files leave the page cache, so that they come
    from the disk (on a machine whose disk has a cache of its own, that one remains). What is called cached, or the page
    cache's, follows a reading.
    """

    name = "checkpoint"

    dir: Path
    """a folder on the disk in question"""
    size_mb: int = 1024
    """size of the checkpoint"""
    rounds: int = 5
    """counted rounds; medians are reported"""

    def rows(self) -> Rows:
        needed = 4 * self.size_mb << 20
        if not self.dir.is_dir() or shutil.disk_usage(self.dir).free < needed:
            raise ConfigError("--dir", str(self.dir), f"must be a folder with {needed / 1e9:.1f} GB free")
        count = max(1, (self.size_mb << 20) // TENSOR_BYTES)
        num_bytes = count * TENSOR_BYTES
        with tempfile.TemporaryDirectory(dir=self.dir) as folder:
            seconds = in_turn(_ways(Path(folder), count, num_bytes), self.rounds)
        rows = []
        for name, times in seconds.items():
            median = statistics.median(times)
            share = statistics.median(ratios_of_rounds(seconds, PLAIN.get(name, name), name))
            rows.append({"what": name, "s": median, "MB/s": num_bytes / median / 1e6, "share_of_plain": share})
        return rows


def _ways(folder: Path, count: int, num_bytes: int) -> Variants:
    """Returns what is timed over a state of `count` tensors: each gives the seconds that count."""
    parallel = single_process_state()
    state = {f"weight.{i}": replicated(torch.randn(TENSOR_BYTES // 4), parallel) for i in range(count)}
    config = CheckpointConfig(save=str(folder / "ours"), load=str(folder / "ours"), keep_last=1)
    background = saving.BackgroundSaver(parallel, timedelta(minutes=10))
    plain, fresh = folder / "plain", folder / "plain.new"
    iteration = 0

    def next_iteration() -> tuple[int, dict[str, int]]:
        nonlocal iteration
        iteration += 1
        return iteration, {"iteration": iteration}

    def disk_write() -> float:
        seconds = _settled(lambda: write_plain(fresh, num_bytes))
        fresh.replace(plain)
        return seconds

    def save() -> None:
        number, progress = next_iteration()
        saving.save_checkpoint(config, number, state, {}, progress, parallel)

    def start_saving() -> float:
        """What training waits for when saving goes on in the background."""
        number, progress = next_iteration()
        seconds = seconds_of(lambda: background.start(config, number, state, {}, progress))
        background.wait()
        return seconds

    def load() -> None:
        """Looks for the newest checkpoint, verifies its digests, and fills the state, as a resumed run does."""

        def load_found(problems_of: Problems) -> None:
            found = store.find_checkpoint(config, problems_of)
            assert found is not None
            loading.load_checkpoint(found, state, parallel)

        loading.load_newest(load_found, parallel)

    def read_again(path: Path) -> float:
        read_plain(path)
        return seconds_of(lambda: read_plain(path))

    def from_disk(read: Run) -> float:
        forget(folder)
        return seconds_of(read)

    return {
        "disk write": disk_write,
        "save": lambda: _settled(save),
        "disk read": lambda: from_disk(lambda: read_plain(plain)),
        "verify and load": lambda: from_disk(load),
        "verify and load, cached": load,
        "page cache read": lambda: read_again(plain),
        "training waits": start_saving,
    }


def _settled(run: Run) -> float:
    """Returns the seconds of a run after the system has finished what it has to write and to free."""
    os.sync()
    time.sleep(SETTLE_S)
    return seconds_of(run)


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
