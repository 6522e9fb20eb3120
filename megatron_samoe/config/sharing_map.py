"""The map of --expert-sharing: one source of experts for each MoE layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_samoe.errors import ConfigError

Way = Literal["own", "combined", "tied", "scaled"]
FLAG = "--expert-sharing"
#: Short forms that need no map. A pool is one set that every router chooses from; neighbours are blocks of layers with one each.
NAMES = (*get_args(Way), "pool", "neighbours")
_ENTRY = re.compile(r"(own|combined|\d{1,6})(?:\*(\d{1,6}))?")
#: Entries of a map; a slip in a repeat must not fill the memory.
_MOST_ENTRIES = 100_000
_ALLOWED = (
    f"must be one of {', '.join(NAMES)}, or an entry for each MoE layer between commas: own, combined, or the number of "
    "the set that the layer uses, such as 0,1,1,1,2 or own,0*3,own; scaled:0*2,1*2 gives each layer a factor on its set"
)


@dataclass(frozen=True)
class Source:
    """The source of one MoE layer's experts.

    Attributes:
        way: own: the layer's alone; combined: a mixture of the pool's banks; tied: a set that other layers use as well;
            scaled: the same, times a learned factor.
        number: of the set.
    """

    way: Way
    number: int = 0


def ways_of(text: str) -> frozenset[str]:
    """Returns the ways that a value of --expert-sharing names; of an illegal value, those that can be read."""
    if text in ("pool", "neighbours"):
        return frozenset(("tied",))
    prefix, _, entries = text.rpartition(":")
    named = {word for word in ("own", "combined") if word in entries}
    if re.search(r"\d", re.sub(r"\*\s*\d+", "", entries)):
        named.add("scaled" if prefix.strip() == "scaled" else "tied")
    return frozenset((text,) if text in get_args(Way) else named)


def parse_sharing(
    text: str, num_layers: int, num_sets: int = 1, untied_ends: int = 0, num_neighbours: int = 2
) -> tuple[Source, ...]:
    """Returns the source of each MoE layer.

    Args:
        num_layers: MoE layers.
        num_sets: number of blocks of consecutive layers, each with a set, where the text says only tied or scaled.
        num_neighbours: layers of a block of neighbours.
        untied_ends: number of first layers, and of last layers, that own their experts, where the text is not a map.

    Raises:
        ConfigError: the text is neither a way nor a map of that many layers, or a map leaves out a set's number.
    """
    text = text.strip()
    if text not in NAMES:
        return _owned_where_alone(_parse_map(text, num_layers))
    if text == "neighbours":
        return _owned_where_alone(tuple(Source("tied", i // num_neighbours) for i in range(num_layers)))
    middle = num_layers - 2 * untied_ends
    if text == "own" or middle <= 0:
        return (Source("own"),) * num_layers
    way: Way = "tied" if text == "pool" else text  # type: ignore[assignment]
    sets = num_sets if text in ("tied", "scaled") else 1
    if sets > middle:
        raise ConfigError("--num-expert-sets", sets, f"must be at most the {middle} MoE layers that share")
    ends = (Source("own"),) * untied_ends
    return _owned_where_alone((*ends, *(Source(way, i * sets // middle) for i in range(middle)), *ends))


def written_map(sources: Sequence[Source]) -> str:
    """Returns the value of --expert-sharing from which `parse_sharing` makes these sources, an entry for each layer."""
    ways, numbers = {s.way for s in sources}, {s.number for s in sources if s.way in ("tied", "scaled")}
    if len(ways) == 1 and not numbers:
        return sources[0].way
    # A tied set that one layer uses is an owned one, which fills the gap that it left among the sets' numbers.
    gaps = [n for n in range(max(numbers, default=0)) if n not in numbers]
    entries = []
    for source in sources:
        if source.way == "own" and gaps:
            entries.append(str(gaps.pop(0)))
        else:
            entries.append(str(source.number) if source.way in ("tied", "scaled") else source.way)
    return ("scaled:" if "scaled" in ways else "") + _written(entries)


def _parse_map(text: str, num_layers: int) -> tuple[Source, ...]:
    prefix, colon, listed = text.rpartition(":")
    if colon and prefix.strip() not in ("tied", "scaled"):
        raise ConfigError(FLAG, text, _ALLOWED)
    way: Way = "scaled" if prefix.strip() == "scaled" else "tied"
    entries: list[str] = []
    for part in listed.strip("[]() ").split(","):
        match = _ENTRY.fullmatch(part.strip())
        if match is None or len(entries) + int(match[2] or 1) > _MOST_ENTRIES:
            raise ConfigError(FLAG, text, _ALLOWED)
        entries += [match[1]] * int(match[2] or 1)
    nearest = _nearest(entries, num_layers)
    if nearest != entries:
        wrong = "must name" if len(entries) == num_layers else f"has {len(entries)} entries and must have"
        what = (
            "the sets 0, 1, ... without a gap"
            if len(entries) == num_layers
            else f"one for each of {num_layers} MoE layers"
        )
        advice = f"{prefix}{colon}{_written(nearest)}"
        raise ConfigError(FLAG, text, f"{wrong} {what}; the nearest legal map is {advice}")
    return tuple(Source(e) if e in ("own", "combined") else Source(way, int(e)) for e in entries)  # type: ignore[arg-type]


def _nearest(entries: Sequence[str], num_layers: int) -> list[str]:
    """Returns the nearest map of the right length, with its sets renumbered in order and without gaps."""
    fitted = [*entries[:num_layers], *[entries[-1]] * (num_layers - len(entries))]
    used = sorted({int(e) for e in fitted if e.isdigit()})
    return [str(used.index(int(e))) if e.isdigit() else e for e in fitted]


def _written(entries: Sequence[str]) -> str:
    runs: list[list] = []
    for entry in entries:
        if runs and runs[-1][0] == entry:
            runs[-1][1] += 1
        else:
            runs.append([entry, 1])
    return ",".join(entry if count == 1 else f"{entry}*{count}" for entry, count in runs)


def renumbered(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Returns the same sources with sets numbered by first use; a tied set that one layer uses is that layer's own."""
    sources = _owned_where_alone(tuple(sources))
    sets = list(dict.fromkeys(source for source in sources if source.way in ("tied", "scaled")))
    return tuple(Source(s.way, sets.index(s)) if s in sets else s for s in sources)


def _owned_where_alone(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Returns the sources with "own" in place of a tied set that only one layer uses."""
    users = Counter(sources)
    return tuple(Source("own") if s.way == "tied" and users[s] == 1 else s for s in sources)
