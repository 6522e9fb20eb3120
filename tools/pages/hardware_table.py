"""Prints the table of docs/hardware.md: what runs of three sizes need, as the planner computes it. Nothing is measured.

Run it as `python -m tools.pages.hardware_table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.planning.accounting import count_parameters
from megatron_samoe.planning.layout_cost import Cluster
from megatron_samoe.planning.layout_planner import plan_layouts

#: Layers, width, heads, experts a layer, banks of the pool, sequences of a step, and GPUs.
SIZES = {
    "125 M": (12, 768, 12, 16, 3, 256, 1),
    "1 B": (24, 2048, 16, 16, 6, 512, 8),
    "7 B": (32, 4096, 32, 16, 8, 1024, 64),
}
SEQUENCE, VOCABULARY, TOKENS_PER_ACTIVE = 2048, 50257, 20
HEAD = ("model", "parameters", "active", "GPUs", "tensor, pipeline, expert, data", "peak GB", "tokens/s", "GPU-hours")


def flags(size: str, experts: str) -> list[str]:
    """Returns the options of a model: `dense`, `moe` or `samoe`."""
    layers, width, heads, count, banks, batch, _ = SIZES[size]
    words = f"--num-layers {layers} --hidden-size {width} --num-attention-heads {heads} --seq-length {SEQUENCE} --bf16"
    words += f" --mock-data --expert-layout {experts} --global-batch-size {batch} --use-distributed-optimizer"
    words += f" --num-experts {count}" if experts != "dense" else ""
    words += f" --num-expert-banks {banks}" if experts == "samoe" else ""
    return words.split()


def row(size: str, experts: str) -> Sequence[str]:
    """Returns what the fastest layout of a model needs."""
    config = parse_pretrain_args(flags(size, experts))
    gpus = SIZES[size][-1]
    # What `megatron-samoe plan` assumes of a GPU, by its data sheet.
    cluster = Cluster(gpus, 8, 72e9, 989e12, 450e9, 50e9, 3350e9, 0.45, 10e-6)
    best = plan_layouts(config, VOCABULARY, cluster, (1, 2, 4, 8))[0]
    count = count_parameters(config, VOCABULARY)
    grid = best.config.parallel
    model = grid.tensor_model_parallel_size * grid.pipeline_model_parallel_size
    layout = (
        grid.tensor_model_parallel_size,
        grid.pipeline_model_parallel_size,
        grid.expert_model_parallel_size,
        gpus // model,
    )
    hours = TOKENS_PER_ACTIVE * count.active / best.tokens_per_s / 3600 * gpus
    return (
        f"{size}, {experts}",
        f"{count.total / 1e9:.2f} B",
        f"{count.active / 1e9:.2f} B",
        str(gpus),
        ", ".join(map(str, layout)),
        f"{best.memory.total / 1e9:.0f}",
        f"{_two_digits(best.tokens_per_s):,}",
        f"{_two_digits(hours):,}",
    )


def _two_digits(number: float) -> int:
    """Returns a number as exactly as the planner knows it, or better."""
    return int(float(f"{number:.1e}"))


def table(sizes: Sequence[str]) -> Iterator[str]:
    """Yields the lines of the table."""
    yield f"| {' | '.join(HEAD)} |"
    yield "|---" * len(HEAD) + "|"
    for size in sizes:
        for experts in ("dense", "moe", "samoe"):
            yield f"| {' | '.join(row(size, experts))} |"


if __name__ == "__main__":
    print("\n".join(table(list(SIZES))))
