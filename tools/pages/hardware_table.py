"""Prints the table of docs/hardware.md: what runs of some sizes need, as the planner computes it. Nothing is measured here.

Run it as `python -m tools.pages.hardware_table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_samoe.config.cli import from_mapping, parse_pretrain_args
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.planning.accounting import count_parameters
from megatron_samoe.planning.gpus import gpu_cluster
from megatron_samoe.planning.layout_planner import plan_layouts
from tools.planner.rows import models

GPU = "H100"
#: Layers, width, heads, experts a layer, banks of the pool, sequences of a step, and GPUs.
SIZES = {
    "125 M": (12, 768, 12, 16, 3, 256, 1),
    "1 B": (24, 2048, 16, 16, 6, 512, 8),
    "7 B": (32, 4096, 32, 16, 8, 1024, 64),
}
#: Published architectures: banks of the pool, a quarter of the MoE layers, sequences of a step, and GPUs.
PUBLISHED = {"Qwen3-235B-A22B": (24, 2048, 256), "DeepSeek-V3": (15, 8192, 1024)}
SEQUENCE, VOCABULARY, TOKENS_PER_ACTIVE = 2048, 50257, 20
HEAD = "| model | parameters, 1e9 | active | GPUs | TP, PP, EP, DP | peak GB | 1,000 tokens/s (interval) | GPU-hours |"


def config_of(name: str, experts: str) -> tuple[PretrainConfig, int]:
    """Returns a model with experts `dense`, `moe` or `samoe`, and its number of GPUs."""
    if name in SIZES:
        *_, gpus = SIZES[name]
        return parse_pretrain_args(flags(name, experts)), gpus
    banks, batch, gpus = PUBLISHED[name]
    described = models()[name]
    moe = described["moe"] | ({"expert_layout": "samoe", "num_expert_banks": banks} if experts == "samoe" else {})
    mapping = {
        "model": described["model"] | {"seq_length": 4096},
        "moe": moe,
        "data": {"mock_data": True, "vocab_size": described["vocab_size"]},
        "training": {"bf16": True, "global_batch_size": batch},
        "parallel": {"use_distributed_optimizer": True},
    }
    return from_mapping(mapping, name), gpus


def flags(size: str, experts: str) -> list[str]:
    """Returns the options of a model: `dense`, `moe` or `samoe`."""
    layers, width, heads, count, banks, batch, _ = SIZES[size]
    words = f"--num-layers {layers} --hidden-size {width} --num-attention-heads {heads} --seq-length {SEQUENCE} --bf16"
    words += f" --mock-data --vocab-size {VOCABULARY} --expert-layout {experts} --global-batch-size {batch}"
    words += " --use-distributed-optimizer"
    words += f" --num-experts {count}" if experts != "dense" else ""
    words += f" --num-expert-banks {banks}" if experts == "samoe" else ""
    return words.split()


def row(name: str, experts: str) -> Sequence[str]:
    """Returns what the fastest layout of a model needs."""
    config, gpus = config_of(name, experts)
    assert config.data.vocab_size is not None
    cluster = gpu_cluster(GPU, gpus)
    best = plan_layouts(config, config.data.vocab_size, cluster, (1, 2, 4, 8))[0]
    count = count_parameters(config, config.data.vocab_size)
    grid = best.config.parallel
    tp, pp, ep = grid.tensor_model_parallel_size, grid.pipeline_model_parallel_size, grid.expert_model_parallel_size
    layout = (tp, pp, ep, gpus // (tp * pp))
    hours = TOKENS_PER_ACTIVE * count.active / best.tokens_per_s / 3600 * gpus
    speeds = best.tokens_per_s / (1 + cluster.spread), best.tokens_per_s * (1 + cluster.spread)
    return (
        f"{name}, {experts}",
        f"{count.total / 1e9:.2f}",
        f"{count.active / 1e9:.2f}",
        str(gpus),
        ", ".join(map(str, layout)),
        f"{best.memory.total / 1e9:.0f}",
        f"{_two_digits(best.tokens_per_s / 1000)} ({'–'.join(_two_digits(speed / 1000) for speed in speeds)})",
        _two_digits(hours),
    )


def _two_digits(number: float) -> str:
    """Returns a number as exactly as the planner knows it, or better."""
    return f"{float(f'{number:.1e}'):,g}"


def table(names: Sequence[str]) -> Iterator[str]:
    """Yields the lines of the table."""
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for name in names:
        for experts in ("dense", "moe", "samoe") if name in SIZES else ("moe", "samoe"):
            yield f"| {' | '.join(row(name, experts))} |"


if __name__ == "__main__":
    print("\n".join(table([*SIZES, *PUBLISHED])))
