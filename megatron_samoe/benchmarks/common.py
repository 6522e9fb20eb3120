"""What the benchmarks share: variants that run in turn, options, the conditions of a run, table, JSON and picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.ops import extension

Rows = list[dict[str, Any]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Columns that say what a row is about, and how a picture introduces their values.
LABELS = {"op": "", "part": "", "model": "", "ranks": "ranks ", "MB": "MB ", "experts": "E ", "topk": "top-",
          "activation": "", "dtype": ""}  # fmt: skip
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def alternate(variants: dict[str, Callable[[], object]], rounds: int, clock: str = "wall") -> dict[str, float]:
    """Returns the median seconds of each variant; a first round warms up and is not counted.

    A variant that returns a float has measured itself (another process): that is its time.
    """
    read = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            started = read()
            result = run()
            seconds = result if isinstance(result, float) else read() - started
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def add_options(parser: argparse.ArgumentParser, rounds: int = 7, ranks: bool = False) -> None:
    """Adds what every benchmark takes; those of several ranks have one thread each and only the wall's clock."""
    parser.add_argument("--rounds", type=int, default=rounds, help="counted rounds; medians are reported")
    if not ranks:
        parser.add_argument("--threads", type=int, help="default: all cores")
        parser.add_argument(
            "--clock", choices=list(CLOCKS), default="wall",
            help="cpu: this process's processor time, for a machine that others use too; with --threads 1",
        )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write results and conditions there")
    parser.add_argument("--png", type=Path, help="also draw the ratios there")


def process_status_kb(name: str, process: int | str = "self") -> int:
    """Returns an entry of Linux's record of a process: VmRSS, what it holds; VmHWM, the most that it held."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what a reader must know to compare the figures."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "extension": extension.build_info().get("instruction_set", "not used"), "clock": getattr(options, "clock", "wall"),
        "load_average": os.getloadavg()[0], "allocator": os.environ.get("GLIBC_TUNABLES", "freed memory kept"),
        # Without paths, which say nothing elsewhere.
        "arguments": {k: v for k, v in vars(options).items()
                      if not callable(v) and not isinstance(v, Path) and k != "peer_python"},
    }  # fmt: skip


def as_table(rows: Rows) -> str:
    """Returns the rows under the keys of the first."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.3g}" if abs(value) < 10 else f"{value:,.1f}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    return format_table([names, *([cell(row.get(name)) for name in names] for row in rows)])


def save(options: argparse.Namespace, rows: Rows, found: dict[str, Any]) -> None:
    """Writes the JSON file and the picture that were asked for."""
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"conditions": found, "rows": rows}, indent=1, default=str) + "\n")
    if options.png:
        _draw(rows, options.png)


def _draw(rows: Rows, path: Path) -> None:
    """Draws every column that holds a ratio, a group of bars for each row that has one."""
    from matplotlib.figure import Figure

    ratios = list(dict.fromkeys(name for row in rows for name in row if " / " in name or name.startswith("share")))
    rows = [row for row in rows if any(name in row for name in ratios)]
    # What all rows have in common needs no label.
    told = [name for name in LABELS if len({row.get(name) for row in rows}) > 1]
    if "part" in told:  # which its bytes follow from
        told.remove("MB")
    labels = [", ".join(f"{LABELS[name]}{row[name]}" for name in told if name in row) for row in rows]
    figure = Figure(figsize=(8.0, 1.2 + 0.16 * len(rows) * (1 + len(ratios))), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(ratios))
    for i, name in enumerate(ratios):
        places = [r + (i - (len(ratios) - 1) / 2) * width for r in range(len(rows))]
        axes.barh(places, [row.get(name) or 0.0 for row in rows], width, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("ratio of speeds")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    figure.legend(loc="outside upper left", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
