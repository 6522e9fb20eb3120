"""The day's share of the parity table: few trainings in which every axis of parallelism meets every value of every factor.

Variants of an axis (virtual stages, ring or all-to-all) meet the values of the factors that they touch.

The factors are read off the table of models: what its models say of sharing, of routing, of attention and style, and of the
optimizer. A new model's new value joins by itself. A training of the day has one value of each factor, so it may be a model
that the table of the night does not have.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_samoe.config import MoEConfig, OptimizerConfig
from tests.harness.layout_training import LAYOUTS, MODELS, is_legal
from tests.harness.pairs import cover

Options = dict[str, Any]

#: An axis, a factor and its value.
Pair = tuple[str, str, str]
FACTORS = ("sharing", "routing", "style", "optimizer", "recomputation")
#: Options that say which experts a layer has; the other ones of experts say how tokens reach them.
_SHARING = ("layout", "expert_sharing", "untied_ends", "moe_layer_freq")
_SHARING_BEGINS = ("num_expert", "samoe_", "neighbour_", "pool_lock_")
_FACTOR_OF = (
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


@dataclass(frozen=True)
class Cell:
    """A training of the day: a layout, and a value of each factor, by name."""

    layout: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.layout}: {', '.join(self.values)}"


def _parts_of(options: Options) -> dict[str, Options]:
    """Returns a model's options by factor; those of no other are of its style."""
    parts: dict[str, Options] = {factor: {} for factor in FACTORS}
    for option, value in options.items():
        parts[_FACTOR_OF.get(option, "style")][option] = value
    return parts


def _values() -> dict[str, dict[str, Options]]:
    """Returns each factor's values, named after the first model that has them. Values that differ in knobs alone are one."""
    found: dict[str, dict[str, Options]] = {factor: {} for factor in FACTORS}
    for name, options in MODELS.items():
        for factor, part in _parts_of(options).items():
            if _essence(part) not in map(_essence, found[factor].values()):
                found[factor][name] = part
    return found


def _essence(part: Options) -> Options:
    usual = {"samoe_combine": "step", "moe_layer_freq": "1", "moe_router_topk": 1}
    usual["moe_router_load_balancing_type"] = "seq_aux_loss"
    knobs = {name for name in _KNOBS if not isinstance(part.get(name), tuple)}
    return {name: value for name, value in part.items() if name not in knobs and usual.get(name) != value}


def _axes(num_ranks: int, sizes: Mapping[str, Any]) -> frozenset[str]:
    """Returns the axes of parallelism of a layout, and the variants of them that it has."""
    named = ("tp", "sp", "pp", "vpp", "ep", "etp", "zero", "overlap", "stages", "cp")
    axes = {axis for axis in named if sizes.get(axis)}
    axes |= {str(sizes[choice]) for choice in ("schedule", "pool", "comm") if choice in sizes}
    if num_ranks > sizes.get("tp", 1) * sizes.get("cp", 1) * sizes.get("pp", 1):
        axes.add("dp")
    return frozenset(axes)


VALUES = _values()
#: Values that every layout can train.
PLAIN = ("moe", *["dense"] * 4)
#: Axes of layouts of four ranks at most: what needs eight is met at night.
AXES = {name: _axes(*layout) for name, layout in LAYOUTS.items() if 1 < layout[0] <= 4}


def options_of(cell: Cell) -> Options:
    """Returns the options of a cell's model."""
    parts = (VALUES[factor][value] for factor, value in zip(FACTORS, cell.values, strict=True))
    return {name: value for part in parts for name, value in part.items()}


@cache
def is_legal_cell(cell: Cell) -> bool:
    """Returns whether a cell can be trained at all."""
    return is_legal(cell.layout, options_of(cell))


@cache
def pairs_of(cell: Cell) -> set[Pair]:
    """Returns the pairs of an axis and a value that meet in a cell."""
    values = {factor: [value] for factor, value in zip(FACTORS, cell.values, strict=True)}
    return {pair for axis in AXES[cell.layout] for pair in _pairs(axis, values)}


def all_pairs() -> set[Pair]:
    """Returns every pair, those that no layout can train among them."""
    return {pair for axis in frozenset[str]().union(*AXES.values()) for pair in _pairs(axis, VALUES)}


def _pairs(axis: str, values: Mapping[str, Iterable[str]]) -> Iterator[Pair]:
    factors = VARIANTS.get(axis, FACTORS)
    yield from ((axis, factor, value) for factor in factors for value in values[factor])
    if not factors:
        yield axis, "", ""


def simple_cells(layout: str) -> Iterator[Cell]:
    """Yields cells of the table's own models, and those in which at most a way of sharing and one other value are not plain."""
    own = ({f: _name(f, part) for f, part in _parts_of(options).items()} for options in MODELS.values())
    yield from (Cell(layout, tuple(values.values())) for values in own)
    for sharing in VALUES["sharing"]:
        for place, factor in enumerate(FACTORS):
            for value in VALUES[factor]:
                values = [sharing, *PLAIN[1:]]
                values[place] = value
                yield Cell(layout, tuple(values))


def _name(factor: str, part: Options) -> str:
    return next(name for name, value in VALUES[factor].items() if _essence(value) == _essence(part))


KEPT = Path(__file__).with_name("parity_by_day.json")


def kept_cells() -> list[Cell]:
    """Returns the cells that were found the last time that `python -m tests.harness.covering` ran."""
    return [Cell(layout, tuple(values)) for layout, values in json.loads(KEPT.read_text())]


def chosen_cells() -> list[Cell]:
    """Returns few cells in which all pairs meet that can: of those that are kept, and simple ones with what these lack."""
    known = [c for c in kept_cells() if c.layout in AXES and all(map(dict.__contains__, VALUES.values(), c.values))]
    missing = all_pairs().difference(*map(pairs_of, known))
    simple = [cell for layout in AXES for cell in simple_cells(layout) if pairs_of(cell) & missing]
    return cover(filter(is_legal_cell, [*known, *simple]), pairs_of, lambda cell: LAYOUTS[cell.layout][0])


if __name__ == "__main__":
    chosen = chosen_cells()
    KEPT.write_text("[\n" + ",\n".join(json.dumps([cell.layout, cell.values]) for cell in chosen) + "\n]\n")
    impossible = all_pairs().difference(*map(pairs_of, chosen))
    print(f"{len(chosen)} trainings, {sum(LAYOUTS[c.layout][0] for c in chosen)} of ranks; no layout has", *impossible)
