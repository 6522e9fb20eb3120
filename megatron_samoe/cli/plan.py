"""Ranks the parallel layouts of a model on a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from megatron_samoe.cli.program import Count, HandsOn, program
from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.option import flag
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.datasets.tokenizer import tokenizer_of
from megatron_samoe.errors import ConfigError, in_units
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.pipeline_parallel.schedule_plan import MUCH_IDLE
from megatron_samoe.planning.accounting import idle_share
from megatron_samoe.planning.cluster import Cluster
from megatron_samoe.planning.gpus import gpu_cluster, measured_cluster, read_measured
from megatron_samoe.planning.layout_planner import PlannedLayout, changes, plan_layouts
from megatron_samoe.planning.layout_plot import draw_layout

#: Options that stand for a figure of the GPU's data sheet: the cluster's field, and its unit.
FIGURES = {
    "gpus_per_node": ("gpus_per_node", 1),
    "memory_gb": ("memory_bytes", 1e9),
    "flops": ("flops", 1.0),
    "efficiency": ("efficiency", 1.0),
    "intra_bandwidth": ("intra_bandwidth", 1e9),
    "inter_bandwidth": ("inter_bandwidth", 1e9),
    "memory_bandwidth": ("memory_bandwidth", 1e9),
}
NO_LINKS = "\nlinks were not measured: torchrun --nproc-per-node N -m megatron_samoe.cli.plan --calibrate does"
Figure = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]


@dataclass(frozen=True, kw_only=True)
class Plan(HandsOn):
    """Ranks the parallel layouts of a model on a cluster: memory, traffic and time per step, and the flags to use.

    All options of the pretrain program describe the model and the batch (--config FILE.yaml, or flags). Options of the layout
    that are given there are kept; the others are chosen here. Figures of time come from a model, not from a run.
    """

    world_size: Count = None
    """ranks, one per GPU (required, but to calibrate)"""
    gpu: str = "H100"
    """H100, B200, B300, GB200 or GB300: its data sheet, and constants of published runs; what follows replaces single
    figures"""
    calibrate: Path | None = None
    """measure this machine in about a minute, write its figures to a file, and plan nothing; by torchrun its links as well"""
    calibration: Path | None = None
    """a file that --calibrate wrote, instead of --gpu"""
    gpus_per_node: Count = None
    memory_gb: Figure = None
    """memory of a GPU that tensors may fill, 1e9 bytes"""
    flops: Figure = None
    """peak of a GPU's matrix products per second"""
    efficiency: Figure = None
    """share of the peak that large products reach"""
    intra_bandwidth: Figure = None
    """GB/s that a GPU sends inside its node"""
    inter_bandwidth: Figure = None
    """GB/s that a GPU sends to other nodes"""
    memory_bandwidth: Figure = None
    """GB/s of a GPU's memory"""
    latency_us: Figure = None
    """of one hop of a collective"""
    micro_batch_sizes: tuple[int, ...] = ()
    """to choose from; default: --micro-batch-size, with --choose-all also 1, 2, 4, 8 and 16"""
    choose_all: bool = False
    """choose also what the configuration says of the layout"""
    top: int = 10
    """layouts to show"""
    json: bool = False
    """print JSON instead of tables"""
    plot: Path | None = None
    """draw the best layout's rank grid (.png, .svg)"""

    def run(self) -> None:
        if self.calibrate is not None:
            return self.measure(self.calibrate)
        cluster = self.cluster()
        config = parse_pretrain_args(self.others, prog="megatron-samoe plan")
        sizes = self.micro_batch_sizes
        if self.choose_all:
            config = replace(config, parallel=ParallelConfig())
            given = config.training.micro_batch_size
            sizes = sizes or tuple(sorted({given, 1, 2, 4, 8, 16}))
        vocab_size = config.data.vocab_size or tokenizer_of(config.data).vocab_size
        layouts = plan_layouts(config, vocab_size, cluster, sizes)
        shown = layouts[: self.top]
        if self.json:
            print(as_json(shown, cluster))
        else:
            machine = (
                f"{self.gpu}, --gpu or --calibration name others" if self.calibration is None else str(self.calibration)
            )
            ranks = f"{cluster.world_size} ranks of {cluster.memory_bytes / 1e9:g} GB ({machine})"
            print(f"{len(layouts)} layouts fit {ranks}; the fastest:\n")
            print(layouts_table(shown, cluster))
            print("\n" + best_in_detail(layouts[0], vocab_size, cluster))
        if self.plot is not None:
            title = f"{config.moe.expert_layout}, {cluster.world_size} ranks: {layouts[0].name()}"
            draw_layout(self.plot, layouts[0].config, cluster.world_size, title, cluster.gpus_per_node)
            print(f"picture: {self.plot}", file=sys.stderr)

    def measure(self, path: Path) -> None:
        """Measures the machine, writes its figures, and says how far those of a known GPU are off."""
        # torch and the trainer: what plans needs neither.
        from megatron_samoe.training.machine_speed import measure_here

        measured = measure_here()
        if measured is None:  # another rank says it
            return
        try:
            path.write_text(json.dumps(measured, indent=1) + "\n")
        except OSError as error:
            raise ConfigError("--calibrate", str(path), f"cannot be written ({error.strerror})") from None
        table = gpu_cluster(self.gpu, 1)
        head = ["figure", "measured here", f"constant of {self.gpu}", "here / there"]
        print(format_table([head, *(_compared(name, value, table) for name, value in measured.items())]))
        print(
            f"\nwritten: {path}; plan with --calibration {path}" + ("" if "inter_bandwidth" in measured else NO_LINKS)
        )

    def cluster(self) -> Cluster:
        """Returns the cluster that the options describe; ConfigError for sizes that no cluster has."""
        if self.world_size is None:
            raise ConfigError("--world-size", None, "must be given: the ranks to plan for")
        given = {name: getattr(self, name) for name in FIGURES if getattr(self, name) is not None}
        for name, value in {**given, "world_size": self.world_size, "top": self.top}.items():
            if not 0 < value < float("inf"):
                raise ConfigError(flag(name), value, "must be above 0")
        if self.latency_us is not None and not 0 <= self.latency_us < float("inf"):
            raise ConfigError("--latency-us", self.latency_us, "must be 0 or more")
        if any(size < 1 for size in self.micro_batch_sizes):
            raise ConfigError("--micro-batch-sizes", self.micro_batch_sizes, "must be positive integers")
        figures: dict[str, Any] = {FIGURES[name][0]: value * FIGURES[name][1] for name, value in given.items()}
        if self.latency_us is not None:
            figures["latency_s"] = self.latency_us * 1e-6
        known = self.calibration and measured_cluster(read_measured(self.calibration), self.world_size)
        return replace(known or gpu_cluster(self.gpu, self.world_size), **figures)


def _compared(name: str, value: float, table: Cluster) -> list[str]:
    """Returns a row: a figure that was measured, that of a known GPU, and their ratio; rates of products at what is reached."""
    there = getattr(table, name) if getattr(table, name) is not None else table.efficiency
    if name == "flops":
        there *= table.efficiency
    if name == "efficiency" or isinstance(there, bool):
        return [name, str(value), "", ""]
    return [name, f"{value:.3g}", f"{there:.3g}", f"{value / there:.2g}" if there else ""]


def layouts_table(layouts: Sequence[PlannedLayout], cluster: Cluster) -> str:
    """Returns one line per layout: memory by part in GB, bytes sent per rank and step by kind in GB, time with the part that
    takes most of it, and speed with the interval that holds nine of ten known runs. What no layout has gets no column."""
    kinds = ["tensor", "expert", "pipeline", "gradients", "pool", "context"]
    head = ["layout", "options", "weights", "grads", "optim", "folded", "banks", "activ", "peak GB"]
    rows = [[*head, *(f"{kind} GB" for kind in kinds), "step s", "most of it", "tokens/s", "9 of 10 within"]]
    for layout in layouts:
        m, sent = layout.memory, layout.cost.sent_bytes
        held = (
            m.weights,
            m.gradients,
            m.optimizer,
            m.folded_weights + m.folded_gradients,
            m.gathered_banks,
            m.activations,
            m.total,
        )
        rows.append(
            [
                layout.name(),
                layout.options(),
                *map(_gigabytes, held),
                *(_gigabytes(sent.get(kind, 0.0)) for kind in kinds),
                f"{layout.cost.step_s:.3g}",
                "{} {:.0%}".format(*layout.cost.largest),
                f"{layout.tokens_per_s:,.0f}",
                " to ".join(f"{float(f'{speed:.1e}'):,.0f}" for speed in _interval(layout, cluster)),
            ]
        )
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) - {"", "0"}]
    return format_table([list(row) for row in zip(*columns, strict=True)])


def _gigabytes(num_bytes: float) -> str:
    """Returns a cell of a column in GB, of a small model too."""
    return f"{num_bytes / 1e9:.2f}" if num_bytes >= 1e8 else f"{num_bytes / 1e9:.2g}"


def _interval(layout: PlannedLayout, cluster: Cluster) -> tuple[float, float]:
    """Returns the tokens per second between which nine of ten known runs were."""
    return layout.tokens_per_s / (1 + cluster.spread), layout.tokens_per_s * (1 + cluster.spread)


def best_in_detail(layout: PlannedLayout, vocab_size: int, cluster: Cluster) -> str:
    """Returns the parts of the best layout's step and memory, its flags, and what changes of it would buy."""
    seconds = ", ".join(f"{part} {s:.3g}" for part, s in layout.cost.seconds.items() if s)
    memory = ", ".join(f"{part} {_gigabytes(b)}" for part, b in layout.memory.parts().items())
    lines = [
        f"best: {layout.name()}",
        f"seconds: {seconds}",
        f"GB on rank {layout.rank}: {memory}",
        f"flags: {' '.join(layout.flags()) or 'none: the defaults'}",
    ]
    if layout.config.moe.shares_experts:
        shares = (layout.cost.seconds.get(part, 0.0) / layout.cost.step_s for part in ("fold", "pool"))
        lines.append("sharing experts: combining and contracting {:.1%} of a step, exchanging {:.1%}".format(*shares))
    found = [_change(words, other, layout, cluster) for words, other in changes(layout, vocab_size, cluster)]
    lines += [f"one change: {'; '.join(found)}"] if found else []
    return "\n  ".join(lines) + _idle(layout)


def _change(words: str, other: PlannedLayout, layout: PlannedLayout, cluster: Cluster) -> str:
    """Returns what a change buys, and whether it fits."""
    lacking = other.memory.total - cluster.memory_bytes
    gain = other.tokens_per_s / layout.tokens_per_s - 1
    return f"{words} {gain:+.0%}" + (f", lacks {in_units(lacking, 'B')}" if lacking > 0 else "")


def _idle(layout: PlannedLayout) -> str:
    """Returns a warning where a pipeline stands still for much of a step."""
    share = idle_share(layout.config, layout.world_size)
    if share <= MUCH_IDLE:
        return ""
    return (
        f"\n  warning: ranks stand idle for {share:.0%} of a step, while the pipeline fills and drains: more micro-batches (a larger "
        "--global-batch-size or a smaller --micro-batch-size), virtual stages or fewer stages idle less"
    )


def as_json(layouts: Sequence[PlannedLayout], cluster: Cluster) -> str:
    """Returns the layouts as a JSON list."""
    rows = [
        {
            "layout": layout.name(),
            "flags": layout.flags(),
            "tokens_per_s": layout.tokens_per_s,
            "tokens_per_s_interval": _interval(layout, cluster),
            "step_s": layout.cost.step_s,
            "seconds": layout.cost.seconds,
            "sent_bytes": layout.cost.sent_bytes,
            "largest_rank": layout.rank,
            "peak_bytes": layout.memory.total,
            "bytes": layout.memory.parts(),
        }
        for layout in layouts
    ]
    return json.dumps(rows, indent=1)


main = program(Plan)

if __name__ == "__main__":
    sys.exit(main())
