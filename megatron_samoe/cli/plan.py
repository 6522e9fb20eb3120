"""Ranks the parallel layouts of a model on a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_samoe.cli.program import HandsOn, program
from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.option import flag
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.datasets.tokenizer import tokenizer_of
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.pipeline_parallel.schedule_plan import MUCH_IDLE
from megatron_samoe.planning.accounting import idle_share
from megatron_samoe.planning.layout_cost import Cluster
from megatron_samoe.planning.layout_planner import PlannedLayout, plan_layouts
from megatron_samoe.planning.layout_plot import draw_layout

POSITIVE = (
    "world_size",
    "gpus_per_node",
    "memory_gb",
    "flops",
    "intra_bandwidth",
    "inter_bandwidth",
    "memory_bandwidth",
    "efficiency",
    "top",
)


@dataclass(frozen=True, kw_only=True)
class Plan(HandsOn):
    """Ranks the parallel layouts of a model on a cluster: memory, traffic and time per step, and the flags to use.

    All options of the pretrain program describe the model and the batch (--config FILE.yaml, or flags). Options of the layout
    that are given there are kept; the others are chosen here. Figures of time come from a model, not from a run.
    """

    world_size: int
    """ranks, one per GPU"""
    gpus_per_node: int = 8
    memory_gb: float = 72.0
    """memory of a GPU that tensors may fill, 1e9 bytes"""
    flops: float = 989e12
    """peak of a GPU's matrix products per second"""
    efficiency: float = 0.45
    """share of the peak that products reach"""
    intra_bandwidth: float = 450.0
    """GB/s that a GPU sends inside its node"""
    inter_bandwidth: float = 50.0
    """GB/s that a GPU sends to other nodes"""
    memory_bandwidth: float = 3350.0
    """GB/s of a GPU's memory"""
    latency_us: float = 10.0
    """of one hop of a collective"""
    micro_batch_sizes: tuple[int, ...] = ()
    """to choose from; default: --micro-batch-size"""
    choose_all: bool = False
    """choose also what the configuration says of the layout"""
    top: int = 10
    """layouts to show"""
    json: bool = False
    """print JSON instead of tables"""
    plot: Path | None = None
    """draw the best layout's rank grid (.png, .svg)"""

    def run(self) -> None:
        """Ranks them."""
        cluster = self.cluster()
        config = parse_pretrain_args(self.others, prog="megatron-samoe plan")
        if self.choose_all:
            config = replace(config, parallel=ParallelConfig())
        vocab_size = config.data.vocab_size or tokenizer_of(config.data).vocab_size
        layouts = plan_layouts(config, vocab_size, cluster, self.micro_batch_sizes)
        shown = layouts[: self.top]
        if self.json:
            print(as_json(shown))
        else:
            print(f"{len(layouts)} layouts fit {cluster.world_size} ranks of {self.memory_gb:g} GB; the fastest:\n")
            print(layouts_table(shown))
            print("\n" + best_in_detail(layouts[0]))
        if self.plot is not None:
            title = f"{config.moe.expert_layout}, {cluster.world_size} ranks: {layouts[0].name()}"
            draw_layout(self.plot, layouts[0].config, cluster.world_size, title, cluster.gpus_per_node)
            print(f"picture: {self.plot}", file=sys.stderr)

    def cluster(self) -> Cluster:
        """Returns the cluster that the options describe; ConfigError for sizes that no cluster has."""
        for name in POSITIVE:
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(flag(name), getattr(self, name), "must be above 0")
        if not 0 <= self.latency_us < float("inf"):
            raise ConfigError("--latency-us", self.latency_us, "must be 0 or more")
        if any(size < 1 for size in self.micro_batch_sizes):
            raise ConfigError("--micro-batch-sizes", self.micro_batch_sizes, "must be positive integers")
        return Cluster(
            self.world_size,
            self.gpus_per_node,
            self.memory_gb * 1e9,
            self.flops,
            self.intra_bandwidth * 1e9,
            self.inter_bandwidth * 1e9,
            self.memory_bandwidth * 1e9,
            self.efficiency,
            self.latency_us * 1e-6,
        )


def layouts_table(layouts: Sequence[PlannedLayout]) -> str:
    """Returns one line per layout: memory by part in GB, bytes sent per rank and step by kind in GB, time, speed."""
    kinds = ["tensor", "expert", "pipeline", "gradients", "pool"]
    kinds += ["context"] if any("context" in layout.cost.sent_bytes for layout in layouts) else []
    head = ["layout", "options", "weights", "grads", "optim", "folded", "banks", "activ", "peak GB"]
    rows = [[*head, *(f"{kind} GB" for kind in kinds), "step s", "tokens/s"]]
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
                f"{layout.tokens_per_s:,.0f}",
            ]
        )
    return format_table(rows)


def _gigabytes(num_bytes: float) -> str:
    """Returns a cell of a column in GB, of a small model too."""
    return f"{num_bytes / 1e9:.2f}" if num_bytes >= 1e8 else f"{num_bytes / 1e9:.2g}"


def best_in_detail(layout: PlannedLayout) -> str:
    """Returns the parts of the best layout's step and memory, and its flags."""
    seconds = ", ".join(f"{part} {s:.3g}" for part, s in layout.cost.seconds.items())
    memory = ", ".join(f"{part} {_gigabytes(b)}" for part, b in layout.memory.parts().items())
    return (
        f"best: {layout.name()}\n  seconds: {seconds}\n  GB on rank {layout.rank}: {memory}\n"
        f"  flags: {' '.join(layout.flags()) or 'none: the defaults'}" + _idle(layout)
    )


def _idle(layout: PlannedLayout) -> str:
    """Returns a warning where a pipeline stands still for much of a step."""
    share = idle_share(layout.config, layout.world_size)
    if share <= MUCH_IDLE:
        return ""
    return (
        f"\n  warning: ranks stand idle for {share:.0%} of a step, while the pipeline fills and drains: more micro-batches (a larger "
        "--global-batch-size or a smaller --micro-batch-size), virtual stages or fewer stages idle less"
    )


def as_json(layouts: Sequence[PlannedLayout]) -> str:
    """Returns the layouts as a JSON list."""
    rows = [
        {
            "layout": layout.name(),
            "flags": layout.flags(),
            "tokens_per_s": layout.tokens_per_s,
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
