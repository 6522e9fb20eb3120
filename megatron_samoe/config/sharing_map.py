"""The ways in which MoE layers share experts, as configurations and files see them, and the map of --expert-sharing: one
source of experts for each MoE layer. `moe/sharing` computes the ways; elsewhere nobody knows a way by its name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_samoe.config.entry_points import added
from megatron_samoe.errors import ConfigError
from megatron_samoe.moved import names_moved

FLAG = "--expert-sharing"
#: Entry points of installed packages under this name are ways, too.
GROUP = "megatron_samoe.ways_of_sharing"


@dataclass(frozen=True)
class Way:
    """A way of sharing: what is asked of it without tensors. What makes it is in `moe/sharing/mapped.py`, `_MAKE`, or its `make`.

    Attributes:
        name: in --expert-sharing and its maps.
        stored: what the names of the tensors begin with that its experts come from; {name} is the way's, {number} a set's,
            {layer} that of a layer which owns them.
        is_shared: whether layers share; else each owns its experts.
        in_sets: whether layers use one of several sets, which have numbers; else all its layers use the same banks.
        mixes: whether each layer has coefficients of what it uses.
        make: of a way from outside the package: makes its `SharingWay` from a `SharingContext`.
    """

    name: str
    stored: str = "expert_pool.{name}.bank."
    is_shared: bool = True
    in_sets: bool = False
    mixes: bool = False
    make: Callable[[Any], Any] | None = None

    @property
    def combines(self) -> bool:
        """Whether layers combine --num-expert-banks banks."""
        return self.mixes and not self.in_sets


OWN = Way("own", "layers.{layer}.moe.experts.", is_shared=False)
COMBINED = Way("combined", "expert_pool.bank.", mixes=True)
TIED = Way("tied", "expert_pool.set.{number}.", in_sets=True)
SCALED = Way("scaled", "expert_pool.set.{number}.", in_sets=True, mixes=True)
_WAYS = {way.name: way for way in (OWN, COMBINED, TIED, SCALED)}


@cache
def ways() -> Mapping[str, Way]:
    """Returns the package's ways and those of installed packages, by name.

    Raises:
        ConfigError: an installed package's entry point cannot be loaded, is not a Way, or its name is taken.
    """
    found = dict(_WAYS)
    for entry, value, way in added(GROUP):
        if not (isinstance(way, Way) and way.make is not None and re.fullmatch("[a-z][a-z_]*", way.name)):
            raise ConfigError(entry, value, "must name a Way whose name is of small letters, with a `make`")
        if way.name in found or way.name in NAMES:
            raise ConfigError(entry, way.name, "is the name of another way, too; rename or uninstall one")
        found[way.name] = way
    return found


@dataclass(frozen=True)
class ExpertSource:
    """The source of one MoE layer's experts: how the layer comes by them, and the number of the set if there are several."""

    way: Way
    number: int = 0

    def stored(self, layer: int) -> str:
        """Returns what the names of the tensors begin with that the experts of a layer come from."""
        return self.way.stored.format(name=self.way.name, number=self.number, layer=layer)

    def __str__(self) -> str:
        return f"{self.way.name} {self.number}" if self.way.in_sets else self.way.name


@dataclass(frozen=True)
class Word:
    """A value of --expert-sharing that needs no map.

    Attributes:
        way: of the layers that share.
        options: names of those that it reads, which have no effect with another word.
        balances_sets: whether loads are balanced over a set's layers by default.
    """

    way: Way
    options: frozenset[str] = frozenset()
    balances_sets: bool = False

    def set_of(self, position: int, count: int, num_sets: int, num_neighbours: int) -> int:
        """Returns the set of one of `count` layers that share."""
        if "num_neighbour_layers" in self.options:
            return position // num_neighbours
        return position * num_sets // count if "num_expert_sets" in self.options else 0


_BLOCKS = frozenset(("num_expert_sets", "untied_ends"))
#: A pool is one set that every router chooses from; neighbours are blocks of layers with one each.
_WORDS = {
    "own": Word(OWN),
    "combined": Word(COMBINED, frozenset(("untied_ends",))),
    "tied": Word(TIED, _BLOCKS),
    "scaled": Word(SCALED, _BLOCKS),
    "pool": Word(TIED, frozenset(("pool_lock_step",)), balances_sets=True),
    "neighbours": Word(TIED, frozenset(("num_neighbour_layers", "neighbour_unmask_steps"))),
}
NAMES = tuple(_WORDS)


def word_of(text: str) -> Word | None:
    """Returns what a value of --expert-sharing means that is one word; None for a map, and for what nobody knows."""
    if text in _WORDS:
        return _WORDS[text]
    is_name = re.fullmatch("[a-z_]+", text) is not None
    return Word(ways()[text], frozenset(("untied_ends",))) if is_name and text in ways() else None


def words_with(option: str) -> str:
    """Returns the words with which an option has an effect, for a user; empty where it does not depend on them."""
    *most, last = [name for name, word in _WORDS.items() if option in word.options] or [""]
    return f"{', '.join(most)} or {last}" if most else last


def ways_of(text: str) -> frozenset[Way]:
    """Returns the ways that a value of --expert-sharing names; of an illegal value, those that can be read."""
    if (word := word_of(text.strip())) is not None:
        return frozenset((word.way,))
    prefix, _, entries = text.rpartition(":")
    found = {ways()[word] for word in re.findall("[a-z_]+", entries) if word in ways()}
    if re.search(r"\d", re.sub(r"\*\s*\d+", "", entries)):
        found.add(_way_of_sets(prefix))
    return frozenset(found)


def _way_of_sets(prefix: str) -> Way:
    return SCALED if prefix.strip() == SCALED.name else TIED


_ENTRY = re.compile(r"([a-z_]+|\d{1,6})(?:\*(\d{1,6}))?")
#: Entries of a map; a slip in a repeat must not fill the memory.
_MOST_ENTRIES = 100_000


def _allowed(plain: Mapping[str, Way]) -> str:
    return (
        f"must be one of {', '.join(dict.fromkeys((*NAMES, *plain)))}, or an entry for each MoE layer between commas: "
        f"{', '.join(plain)}, or the number of the set that the layer uses, such as 0,1,1,1,2 or own,0*3,own; "
        "scaled:0*2,1*2 gives each layer a factor on its set"
    )


def parse_sharing(
    text: str, num_layers: int, num_sets: int = 1, untied_ends: int = 0, num_neighbours: int = 2
) -> tuple[ExpertSource, ...]:
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
    word = word_of(text)
    if word is None:
        return _owned_where_alone(_parse_map(text, num_layers))
    middle = num_layers - 2 * untied_ends
    if not word.way.is_shared or middle <= 0:
        return (ExpertSource(OWN),) * num_layers
    if "num_expert_sets" in word.options and num_sets > middle:
        raise ConfigError("--num-expert-sets", num_sets, f"must be at most the {middle} MoE layers that share")
    ends = (ExpertSource(OWN),) * untied_ends
    sets = (word.set_of(position, middle, num_sets, num_neighbours) for position in range(middle))
    return _owned_where_alone((*ends, *(ExpertSource(word.way, number) for number in sets), *ends))


def written_map(sources: Sequence[ExpertSource]) -> str:
    """Returns the value of --expert-sharing from which `parse_sharing` makes these sources, an entry for each layer."""
    used, numbers = {s.way for s in sources}, {s.number for s in sources if s.way.in_sets}
    if len(used) == 1 and not numbers:
        return sources[0].way.name
    # A tied set that one layer uses is an owned one, which fills the gap that it left among the sets' numbers.
    gaps = [n for n in range(max(numbers, default=0)) if n not in numbers]
    entries = []
    for source in sources:
        if not source.way.is_shared and gaps:
            entries.append(str(gaps.pop(0)))
        else:
            entries.append(str(source.number) if source.way.in_sets else source.way.name)
    return ("scaled:" if SCALED in used else "") + _written(entries)


def written_options(sources: Sequence[ExpertSource]) -> dict[str, str | None]:
    """Returns --expert-layout and --expert-sharing of a MoE whose layers have these sources."""
    used = {source.way for source in sources}
    if used == {COMBINED}:
        return {"expert_layout": "samoe", "expert_sharing": None}
    return {"expert_layout": "moe", "expert_sharing": None if used == {OWN} else written_map(sources)}


def _parse_map(text: str, num_layers: int) -> tuple[ExpertSource, ...]:
    prefix, colon, listed = text.rpartition(":")
    known = {name: way for name, way in ways().items() if not way.in_sets}
    if colon and prefix.strip() not in (TIED.name, SCALED.name):
        raise ConfigError(FLAG, text, _allowed(known))
    entries: list[str] = []
    for part in listed.strip("[]() ").split(","):
        match = _ENTRY.fullmatch(part.strip())
        is_known = match is not None and (match[1] in known or match[1].isdigit())
        if match is None or not is_known or len(entries) + int(match[2] or 1) > _MOST_ENTRIES:
            raise ConfigError(FLAG, text, _allowed(known))
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
    sets = _way_of_sets(prefix)
    return tuple(ExpertSource(sets, int(e)) if e.isdigit() else ExpertSource(known[e]) for e in entries)


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


def renumbered(sources: Sequence[ExpertSource]) -> tuple[ExpertSource, ...]:
    """Returns the same sources with sets numbered by first use; a tied set that one layer uses is that layer's own."""
    sources = _owned_where_alone(tuple(sources))
    sets = list(dict.fromkeys(source for source in sources if source.way.in_sets))
    return tuple(ExpertSource(s.way, sets.index(s)) if s in sets else s for s in sources)


def _owned_where_alone(sources: tuple[ExpertSource, ...]) -> tuple[ExpertSource, ...]:
    """Returns the sources with layers that own their experts instead of those that are the only users of an unscaled set."""
    users = Counter(sources)
    return tuple(ExpertSource(OWN) if s.way.in_sets and not s.way.mixes and users[s] == 1 else s for s in sources)


__getattr__ = names_moved(__name__, {"Source": ExpertSource})
