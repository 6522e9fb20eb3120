"""What every benchmark is: options, variants that run in turn, and rows that become a table and JSON.

Each figure is a median over rounds in which all variants run in turn, so that other load on the machine meets them alike.
Only ratios of one run count: a column "a / b" is a's speed over b's.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from megatron_samoe.gpu_check.tables import as_table
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state import backend
from megatron_samoe.training.machine import cpu_name

Row = dict[str, Any]
Rows = list[Row]
Run = Callable[[], object]
Variants = Mapping[str, Run]
Times = dict[str, list[float]]
Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Options of a benchmark; a subclass adds its own and says what runs.

    Attributes:
        name: of the command.
        not_told: options that are left out of the conditions, as paths are, which say nothing elsewhere.
    """

    name: ClassVar[str]
    not_told: ClassVar[tuple[str, ...]] = ()

    rounds: int = 7
    """counted rounds; medians are reported"""
    json: Path | None = None
    """also write results and conditions there"""

    def run(self) -> int | None:
        """Measures, prints and saves."""
        raise NotImplementedError

    def write_json(self, content: Any) -> None:
        """Writes the JSON file that was asked for, if one was."""
        if self.json:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            self.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


@dataclass(frozen=True, kw_only=True)
class TableBenchmark(Benchmark):
    """One whose rows are a table, under the conditions of this process."""

    def rows(self) -> Rows:
        """Measures."""
        raise NotImplementedError

    def run(self) -> int | None:
        switch = extension.ENVIRONMENT_VARIABLE
        if os.environ.get(switch) != "off" and not extension.available():  # which says why
            print(f"error: this would time the slower torch ops; {switch}=off says that you mean to.", file=sys.stderr)
            return 2
        backend.keep_freed_memory()
        backend.set_num_threads(getattr(self, "threads", 1))
        torch.manual_seed(1)
        found = self.conditions()
        rows = self.rows()
        self.save(rows, found)
        print(f"{found['threads']} threads, torch {found['torch']}, extension {found['extension']}, {found['cpu']}\n")
        print(as_table(rows))
        return 0

    def conditions(self) -> Row:
        """Returns what a reader must know to compare the figures."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.not_told}
        return {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "extension": extension.build_info().get("instruction_set", "not used"),
            "clock": getattr(self, "clock", "wall"),
            "load_average": os.getloadavg()[0],
            "allocator": os.environ.get("GLIBC_TUNABLES", "freed memory kept"),
            "arguments": {
                "command": self.name,
                **{name: value for name, value in options.items() if not isinstance(value, Path)},
            },
        }

    def save(self, rows: Rows, found: Row) -> None:
        """Writes the JSON file that was asked for."""
        self.write_json({"conditions": found, "rows": rows})


@dataclass(frozen=True, kw_only=True)
class ProcessBenchmark(TableBenchmark):
    """One of this process alone."""

    threads: int | None = None
    """default: all cores"""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: this process's processor time, for a machine that others use too; with --threads 1"""

    def medians(self, variants: Variants) -> dict[str, float]:
        """Returns the median seconds of each variant; see `in_turn`."""
        return medians_of(in_turn(variants, self.rounds, CLOCKS[self.clock]))


def in_turn(variants: Variants, rounds: int, read: Callable[[], float] = time.perf_counter) -> Times:
    """Returns each variant's seconds in each round, by a clock; a first round warms up and is not counted.

    A variant that returns a float has measured itself (another process): that is its time.
    """
    times: Times = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            started = read()
            result = run()
            seconds = result if isinstance(result, float) else read() - started
            if number:
                times[name].append(seconds)
    return times


def medians_of(times: Times) -> dict[str, float]:
    """Returns the median of each list."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratios_of_rounds(times: Times, name: str, over: str) -> list[float]:
    """Returns one variant's time over another's, round by round."""
    return [a / b for a, b in zip(times[name], times[over], strict=True)]


def seconds_of(run: Run) -> float:
    """Returns the seconds that a run takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def milliseconds(medians: Mapping[str, float], digits: int = 3) -> Row:
    """Returns a column for each variant."""
    return {f"{name} ms": round(seconds * 1e3, digits) for name, seconds in medians.items()}


def speed(medians: Mapping[str, float], ours: str, *others: str, digits: int = 2) -> Row:
    """Returns the columns of one variant's speed over those of others."""
    return {f"{ours} / {other}": round(medians[other] / medians[ours], digits) for other in others}


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def forget_peak() -> None:
    """Sets this process's record of the most memory that it held to the present."""
    Path("/proc/self/clear_refs").write_text("5")


def process_status_kb(name: str, process: int | str = "self") -> int:
    """Returns an entry of Linux's record of a process: VmRSS, what it holds; VmHWM, the most that it held."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
