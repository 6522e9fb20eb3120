"""A picture of a layout, drawn from the real rank grid. It needs matplotlib, which is imported when a picture is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.layer_layout import StagePlan, rank_plans
from megatron_samoe.parallel_state.rank_grid import RankGrid

#: More cells than this cannot be read; of larger worlds each stage's first ranks are drawn.
MAX_CELLS = 256


def draw_layout(path: Path, config: PretrainConfig, world_size: int, title: str, gpus_per_node: int) -> None:
    """Writes a PNG: every rank's place on the dense and on the expert grid, by pipeline stage and node.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ConfigError("--plot", str(path), "needs matplotlib: pip install matplotlib") from None
    grid = RankGrid.of(config.parallel, world_size)
    shown = _shown_ranks(grid, gpus_per_node)
    columns = min(gpus_per_node, world_size // grid.pp)
    rows = [stage[i : i + columns] for stage in shown for i in range(0, len(stage), columns)]
    figure, panels = plt.subplots(
        1, 2, figsize=(2 * (0.95 * columns + 2.4), 0.55 * len(rows) + 2.2), layout="constrained"
    )
    for axes, which in zip(panels, ("dense", "expert"), strict=True):
        _draw_grid(axes, grid, rows, columns, which, config)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError("--plot", str(path), f"cannot be written ({error.strerror})") from None
    finally:
        plt.close(figure)


def _shown_ranks(grid: RankGrid, gpus_per_node: int) -> list[list[int]]:
    """Returns the ranks to draw, by stage."""
    per_stage = grid.world_size // grid.pp
    room = max(gpus_per_node, MAX_CELLS // grid.pp // gpus_per_node * gpus_per_node)
    stages = range(grid.pp) if grid.pp <= 16 else [*range(8), *range(grid.pp - 8, grid.pp)]
    return [list(range(s * per_stage, s * per_stage + min(per_stage, room))) for s in stages]


def _draw_grid(
    axes: Any, grid: RankGrid, rows: list[list[int]], columns: int, which: str, config: PretrainConfig
) -> None:
    import matplotlib
    from matplotlib.patches import Rectangle

    colored = "dp" if which == "dense" else "ep"
    palette, sizes = matplotlib.colormaps["tab20"], grid.axes(which)
    names = {"tp": "t", "cp": "c", "dp": "d", "etp": "t", "ep": "e", "edp": "D"}
    per_stage, last_stage = grid.world_size // grid.pp, None
    for y, ranks in enumerate(rows):
        for x, rank in enumerate(ranks):
            place = grid.coordinates(rank, which)
            axes.add_patch(
                Rectangle(
                    (x, y),
                    0.96,
                    0.9,
                    facecolor=(*palette(place[colored] % 20)[:3], 0.55),
                    edgecolor="black",
                    linewidth=0.4,
                )
            )
            text = " ".join(f"{names[axis]}{place[axis]}" for axis in sizes if axis != "pp" and sizes[axis] > 1)
            axes.text(x + 0.48, y + 0.28, str(rank), ha="center", va="center", fontsize=8, fontweight="bold")
            axes.text(x + 0.48, y + 0.64, text, ha="center", va="center", fontsize=7)
        stage = ranks[0] // per_stage
        if stage != last_stage:
            axes.axhline(y - 0.05, color="black", linewidth=1.6 if y else 0)
            axes.text(
                -0.15, y + 0.45, _stage_name(stage, rank_plans(config, stage)), ha="right", va="center", fontsize=8
            )
        last_stage = stage
    hidden = grid.world_size - sum(map(len, rows))
    axes.set_xlim(0, columns)
    axes.set_ylim(len(rows), -0.1)
    axes.axis("off")
    legend = {
        "dense": "attention, norms, embeddings, dense MLPs\nd: data-parallel place (colour), t: tensor slice, c: part of sequences",
        "expert": "routed experts and the pool\ne: expert slice (colour), t: expert-tensor slice, D: expert-data place",
    }
    more = f"\n{hidden} more ranks are not drawn" if hidden else ""
    shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    axes.set_title(f"{which} grid: {shape}\n{legend[which]}{more}", fontsize=9)


def _stage_name(stage: int, plans: tuple[StagePlan, ...]) -> str:
    """Returns a stage's number and its layers, as words."""
    runs = []
    for plan in plans:
        parts = ["emb"] if plan.has_embedding else []
        if plan.layers:
            first, last = plan.layers[0].index, plan.layers[-1].index
            parts.append(f"{first}" if first == last else f"{first}-{last}")
        runs.append("+".join([*parts, *(["head"] if plan.has_head else [])]) or "nothing")
    return f"stage {stage}\n{', '.join(runs)}"
