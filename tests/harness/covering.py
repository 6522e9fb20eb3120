"""The day's share of the parity table: few trainings in which every axis of parallelism meets every value of every factor.

Variants of an axis (virtual stages, ring or all-to-all) meet the values of the factors that they touch.

The factors are read off the table of models: what its models say of sharing, of routing, of attention and style, and of the
optimizer. A new model's new value joins by itself. A training of the day has one value of each factor, so it may be a model
that the table of the night does not have.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from megatron_samoe.config import MoEConfig, OptimizerConfig
from tests.harness.layout_training import LAYOUTS, MODELS, is_legal

Options = dict[str, Any]

#: An axis, a factor and its value.
Pair = tuple[str, str, str]
FACTORS = ("sharing", "routing", "style", "optimizer", "recomputation")
#: Options that say which experts a layer has; the other ones of experts say how tokens reach them.
_SHARING = ("layout", "expert_sharing", "untied_ends", "moe_layer_freq")
_SHARING_BEGINS = ("num_expert", "samoe_", "neighbour_", "pool_lock_")
_FACTORS = (
    {f.name: "routing" for f in dataclasses.fields(MoEConfig)}
    | {f.name: "sharing" for f in dataclasses.fields(MoEConfig) if f.name.startswith(_SHARING_BEGINS)}
    | dict.fromkeys(_SHARING, "sharing")
    | {f.name: "optimizer" for f in dataclasses.fields(OptimizerConfig)}
    | {"micro_step": "routing", "recompute_granularity": "recomputation"}
)
#: Numbers by which no other code runs.
_KNOBS = "moe_aux_loss_coeff moe_router_init_method_std init_method_std num_experts moe_router_bias_update_rate".split()
#: Variants of an axis, and the factors whose values must meet them; they meet some value of the others.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    **{"vpp": ("sharing",), "a2a": ("style",), "overlap": ("optimizer",)},
    **{"stages": (), "gpipe": ()},
}


def factor_of(option: str) -> str:
    """Returns the factor that an option of a model belongs to; options of no other are of its style."""
    return _FACTORS.get(option, "style")


def values_of(models: Mapping[str, Options]) -> dict[str, dict[str, Options]]:
    """Returns each factor's values, named after the first model that has them. Values that differ in knobs alone are one."""
    found: dict[str, dict[str, Options]] = {factor: {} for factor in FACTORS}
    for name, options in models.items():
        for factor, values in found.items():
            part = {option: value for option, value in options.items() if factor_of(option) == factor}
            if _essence(part) not in [_essence(value) for value in values.values()]:
                values[name] = part
    return found


def _essence(part: Options) -> Options:
    usual = {"samoe_combine": "step", "moe_layer_freq": "1", "moe_router_topk": 1}
    usual["moe_router_load_balancing_type"] = "seq_aux_loss"
    knobs = {name for name in _KNOBS if not isinstance(part.get(name), tuple)}
    return {name: value for name, value in part.items() if name not in knobs and usual.get(name) != value}


def axes_of(num_ranks: int, sizes: Mapping[str, Any]) -> frozenset[str]:
    """Returns the axes of parallelism of a layout, and the variants of them that it has."""
    named = ("tp", "sp", "pp", "vpp", "ep", "etp", "zero", "overlap", "stages", "cp")
    axes = {axis for axis in named if sizes.get(axis)}
    axes |= {str(sizes[choice]) for choice in ("schedule", "pool", "comm") if choice in sizes}
    if num_ranks > sizes.get("tp", 1) * sizes.get("cp", 1) * sizes.get("pp", 1):
        axes.add("dp")
    return frozenset(axes)


@dataclass(frozen=True)
class Cell:
    """A training of the day: a layout, and a value of each factor, by name."""

    layout: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.layout}: {', '.join(self.values)}"


@dataclass
class Covering:
    """A search for the cells of a day.

    Attributes:
        layouts: by name, the number of ranks and the sizes.
        values: of each factor, by name.
        plain: the values to begin with, which every layout can train.
        is_legal: whether a cell can be trained at all; asked once for each.
    """

    layouts: Mapping[str, tuple[int, Mapping[str, Any]]]
    values: Mapping[str, Mapping[str, Options]]
    plain: tuple[str, ...]
    is_legal: Callable[[Cell], bool]

    def __post_init__(self) -> None:
        self.axes = {name: axes_of(*layout) for name, layout in self.layouts.items()}
        self.is_legal = cache(self.is_legal)

    def pairs_of(self, cell: Cell) -> set[Pair]:
        """Returns the pairs of an axis and a value that meet in a cell."""
        values = dict(zip(FACTORS, cell.values, strict=True))
        return {
            pair for axis in self.axes[cell.layout] for pair in self._pairs(axis, {f: [v] for f, v in values.items()})
        }

    def all_pairs(self) -> set[Pair]:
        """Returns every pair, those that no layout can train among them."""
        axes = frozenset[str]().union(*self.axes.values())
        return {pair for axis in axes for pair in self._pairs(axis, self.values)}

    @staticmethod
    def _pairs(axis: str, values: Mapping[str, Iterable[str]]) -> Iterator[Pair]:
        factors = VARIANTS.get(axis, FACTORS)
        yield from ((axis, factor, value) for factor in factors for value in values[factor])
        if not factors:
            yield axis, "", ""

    def search(self) -> tuple[list[Cell], set[Pair]]:
        """Returns cells in which all pairs meet that can, and the pairs that cannot: greedily, again and again the cell that
        brings the most missing pairs together for each rank-training that it costs, one process's included."""
        missing, cells = self.all_pairs(), list[Cell]()
        while missing:
            models = {cell.values for cell in cells}
            found = [Cell(layout, model) for layout in self.layouts for model in sorted(models)]
            found += [cell for n in self.layouts if (cell := self._best_of(n, missing)) is not None]
            costs = {c: self.layouts[c.layout][0] + (c.values not in models) for c in found if self.is_legal(c)}
            gains = {cell: len(self.pairs_of(cell) & missing) / cost for cell, cost in costs.items()}
            best = max(gains, key=gains.__getitem__)
            if not gains[best]:
                break
            cells.append(best)
            missing -= self.pairs_of(best)
        return cells, missing

    def _best_of(self, layout: str, missing: set[Pair]) -> Cell | None:
        """Returns a legal cell of a layout that brings many missing pairs together, if there is one."""
        gains = {
            factor: {v: sum((axis, factor, v) in missing for axis in self.axes[layout]) for v in values}
            for factor, values in self.values.items()
        }
        found = self._grown(Cell(layout, self.plain), gains)
        if self.is_legal(found) and self.pairs_of(found) & missing:
            return found
        # Whichever sharing lets the other factors have their values.
        starts = (Cell(layout, (sharing, *self.plain[1:])) for sharing in self.values["sharing"])
        grown = (self._grown(start, {**gains, "sharing": {}}) for start in starts)
        return max(filter(self.is_legal, grown), key=lambda c: len(self.pairs_of(c) & missing), default=None)

    def _grown(self, cell: Cell, gains: Mapping[str, Mapping[str, int]]) -> Cell:
        """Returns a cell whose factors take one after the other the value with the most missing pairs that is legal beside those
        taken before."""
        for place, factor in enumerate(FACTORS):
            for value in sorted(gains[factor], key=lambda v: -gains[factor][v]):
                if not gains[factor][value]:
                    break
                changed = replace(cell, values=(*cell.values[:place], value, *cell.values[place + 1 :]))
                if self.is_legal(changed):
                    cell = changed
                    break
        return cell


def options_of(cell: Cell) -> Options:
    """Returns the options of a cell's model."""
    parts = (VALUES[factor][value] for factor, value in zip(FACTORS, cell.values, strict=True))
    return {name: value for part in parts for name, value in part.items()}


VALUES = values_of(MODELS)
#: Four ranks at most: what needs eight is met at night.
COVERING = Covering(
    {name: layout for name, layout in LAYOUTS.items() if 1 < layout[0] <= 4},
    VALUES,
    ("moe", *["dense"] * 4),
    lambda cell: is_legal(cell.layout, options_of(cell)),
)
KEPT = Path(__file__).with_name("parity_by_day.json")


def kept_cells() -> list[Cell]:
    """Returns the cells that were found the last time that `python -m tests.harness.covering` ran."""
    return [Cell(layout, tuple(values)) for layout, values in json.loads(KEPT.read_text())]


if __name__ == "__main__":
    chosen, impossible = COVERING.search()
    KEPT.write_text("[\n" + ",\n".join(json.dumps([cell.layout, cell.values]) for cell in chosen) + "\n]\n")
    print(
        f"{len(chosen)} trainings, {sum(LAYOUTS[c.layout][0] for c in chosen)} of ranks; no layout has",
        *sorted(impossible),
    )
