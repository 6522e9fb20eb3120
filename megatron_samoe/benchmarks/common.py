"""What the benchmarks share: variants that run in turn, options, the conditions of a run, table, JSON and picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.cli.arguments import Options, adder
from megatron_samoe.config import ModelConfig, MoEConfig, PretrainConfig, TrainingConfig
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.ops import extension

Row = dict[str, Any]
Rows = list[Row]
Run = Callable[[], object]
Variants = Mapping[str, Run]
Times = dict[str, list[float]]
#: What adds a flag: see `cli.arguments.adder`.
Adder = Callable[..., argparse.Action]
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


def alternate(variants: Variants, rounds: int, clock: str = "wall") -> dict[str, float]:
    """Returns the median seconds of each variant; see `in_turn`."""
    return medians_of(in_turn(variants, rounds, CLOCKS[clock]))


def seconds_of(run: Run) -> float:
    """Returns the seconds that a run takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def add_command(commands: Any, name: str, text: str, run: Callable[[Options], Any], **options: Any) -> Adder:
    """Adds a subcommand and returns what adds its flags.

    Args:
        run: gives rows for a table; where it `is_alone`, prints and saves itself, and gives an exit status or None.
    """
    parser = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    parser.set_defaults(run=run, is_alone=False)
    return adder(parser)


def add_alone(commands: Any, name: str, text: str, run: Callable[[Options], Any], **options: Any) -> Adder:
    """Adds a subcommand that sets its own conditions, and prints and saves itself; see `add_command`."""
    add = add_command(commands, name, text, run, **options)
    commands.choices[name].set_defaults(is_alone=True)
    return add


def add_sizes(add: Adder, text: str | None = None, /, **sizes: int) -> None:
    """Adds flags for whole numbers, by their defaults, with one text for all."""
    for name, size in sizes.items():
        add(f"--{name.replace('_', '-')}", size, text)


def add_options(add: Adder, rounds: int = 7, ranks: bool = False) -> None:
    """Adds what every benchmark takes; those of several ranks have one thread each and only the wall's clock."""
    add("--rounds", rounds, "counted rounds; medians are reported")
    if not ranks:
        add("--threads", int, "default: all cores")
        add(
            "--clock",
            tuple(CLOCKS),
            "cpu: this process's processor time, for a machine that others use too; with --threads 1",
        )
    add("--json", Path, "also write results and conditions there")
    add("--png", Path, "also draw the ratios there")


def model_config(options: Options, layout: Any, num_micro_batches: int, dp: int = 1, **moe: Any) -> PretrainConfig:
    """Returns a model to train; a SaMoE has a bank for four layers by default. None stands for a default."""
    given = (
        {} if layout == "dense" else {"expert_layout": layout, "num_experts": options.num_experts, "moe_router_topk": 1}
    )
    if layout == "samoe":
        given["num_expert_banks"] = max(1, options.num_layers // 4)
    given |= {name: value for name, value in moe.items() if value is not None and layout != "dense"}
    return PretrainConfig(
        model=ModelConfig(
            num_layers=options.num_layers, hidden_size=options.hidden_size, num_attention_heads=options.hidden_size // 64,
            seq_length=options.seq_length,
        ),
        moe=MoEConfig(**given),
        training=TrainingConfig(
            micro_batch_size=options.micro_batch_size, global_batch_size=options.micro_batch_size * num_micro_batches * dp
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class MadeModel:
    """A model whose tensors are made when they are read, as the source of a checkpoint."""

    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    train_state: Mapping[str, Any]
    make: Callable[[str], torch.Tensor]
    attachments: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor."""
        return self.make(name)


def forget_peak() -> None:
    """Sets this process's record of the most memory that it held to the present."""
    Path("/proc/self/clear_refs").write_text("5")


def process_status_kb(name: str, process: int | str = "self") -> int:
    """Returns an entry of Linux's record of a process: VmRSS, what it holds; VmHWM, the most that it held."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def conditions(options: Options) -> dict[str, Any]:
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
                      if not callable(v) and not isinstance(v, Path) and k not in ("peer_python", "is_alone")},
    }  # fmt: skip


def as_table(rows: Rows) -> str:
    """Returns the rows under the keys of the first."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.3g}" if abs(value) < 10 else f"{value:,.1f}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    return format_table([names, *([cell(row.get(name)) for name in names] for row in rows)])


def write_json(path: Path | None, content: Any) -> None:
    """Writes the JSON file that was asked for, if one was."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def save(options: Options, rows: Rows, found: dict[str, Any]) -> None:
    """Writes the JSON file and the picture that were asked for."""
    write_json(options.json, {"conditions": found, "rows": rows})
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
