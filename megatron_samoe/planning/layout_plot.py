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
#: Of each grid the axis that gives the colour, the palette, and how far below a cell's top its band begins.
DRAWN = {"dense": ("dp", "tab20", 0.25), "expert": ("ep", "Set2", 0.57)}
LETTERS = {"tp": "t", "cp": "c", "dp": "d", "etp": "t", "ep": "e", "edp": "D"}


def draw_layout(path: Path, config: PretrainConfig, world_size: int, title: str, gpus_per_node: int) -> None:
    """Writes a picture, PNG or what else the name ends with: every rank's position on the dense and on the expert grid, a row for a node.

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
    figure, axes = plt.subplots(figsize=(0.95 * columns + 1.4, 0.72 * len(rows) + 1.9), layout="constrained")
    for y, ranks in enumerate(rows):
        for x, rank in enumerate(ranks):
            _draw_rank(axes, grid, rank, x, y)
    _name_stages(axes, grid, rows, columns, config)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=140)
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


def _draw_rank(axes: Any, grid: RankGrid, rank: int, x: int, y: int) -> None:
    """Draws a rank's number, and below it its position on either grid, in the colour of the part that it holds there."""
    import matplotlib
    from matplotlib.patches import Rectangle

    axes.text(x + 0.48, y + 0.13, str(rank), ha="center", va="center", fontsize=9, fontweight="bold")
    for which, (colored, palette, top) in DRAWN.items():
        position, sizes = grid.coordinates(rank, which), grid.axes(which)
        colors = matplotlib.colormaps[palette]
        color = (*colors(position[colored] % colors.N)[:3], 0.5)
        axes.add_patch(Rectangle((x, y + top), 0.96, 0.32, facecolor=color, edgecolor="black", linewidth=0.4))
        text = " ".join(f"{LETTERS[axis]}{position[axis]}" for axis in sizes if axis != "pp" and sizes[axis] > 1)
        axes.text(x + 0.48, y + top + 0.17, text, ha="center", va="center", fontsize=9)


def _name_stages(axes: Any, grid: RankGrid, rows: list[list[int]], columns: int, config: PretrainConfig) -> None:
    """Writes next to the rows which stage they are, and a title above them."""
    per_stage, last_stage = grid.world_size // grid.pp, None
    for y, ranks in enumerate(rows):
        stage = ranks[0] // per_stage
        if stage != last_stage:
            axes.axhline(y - 0.05, color="black", linewidth=1.6 if y else 0)
            name = _stage_name(stage, rank_plans(config, stage))
            axes.text(-0.1, y + 0.45, name, ha="right", va="center", fontsize=9)
        last_stage = stage
    hidden = grid.world_size - sum(map(len, rows))
    axes.set_xlim(0, columns)
    axes.set_ylim(len(rows), -0.1)
    axes.axis("off")
    shapes = {which: " x ".join(f"{axis} {size}" for axis, size in grid.axes(which).items()) for which in DRAWN}
    axes.set_title(
        f"upper band: dense grid, {shapes['dense']}\n"
        "t: tensor slice, c: part of sequences, d: data-parallel rank (colour)\n"
        f"lower band: expert grid, {shapes['expert']}\n"
        "t: expert-tensor slice, e: expert slice (colour), D: expert-data rank"
        + (f"\n{hidden} more ranks are not drawn" if hidden else ""),
        fontsize=9,
    )


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
