"""Several ways of sharing in one model, each for the layers that a sharing map gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import replace

from torch import nn

from megatron_samoe.config.sharing_map import Source
from megatron_samoe.moe.sharing.combined import CombinedSharing
from megatron_samoe.moe.sharing.expert_pool import ExpertPool
from megatron_samoe.moe.sharing.own import OwnSharing
from megatron_samoe.moe.sharing.tied import TiedSharing
from megatron_samoe.moe.sharing.way import ExpertLender, LenderCosts, SharingContext, SharingWay
from megatron_samoe.moe.types import Experts


def configured_sharing(context: SharingContext) -> SharingWay:
    """Returns the way that --expert-sharing or --expert-layout asks for."""
    ways = {source.way for source in context.sources}
    if ways == {"combined"}:
        return CombinedSharing(context)
    return MappedSharing(context) if ways - {"own"} else OwnSharing(context)


def shared_pools(part: nn.Module | None) -> tuple[ExpertPool | None, dict[int, ExpertPool]]:
    """Returns the pool that layers combine and the sets by number, as the shared part of `configured_sharing` has them."""
    if part is None or isinstance(part, ExpertPool):
        return part, {}
    parts = dict(part.named_children())
    sets = {int(number): pool for number, pool in parts["set"].named_children()} if "set" in parts else {}
    return parts.get("combined"), sets  # type: ignore[return-value]


def _group(source: Source) -> str:
    """Returns the name of the layers that one way lends to together."""
    return f"scaled {source.number}" if source.way == "scaled" else source.way


def _way(group: str, context: SharingContext) -> SharingWay:
    """Returns the way of one group's layers. A scaled set is a pool of one bank, whose coefficients are the factors."""
    if group.startswith("scaled"):
        config = replace(
            context.config,
            num_expert_banks=1,
            samoe_granularity="layer",
            samoe_normalization="none",
            samoe_init="cyclic",
        )
        return CombinedSharing(replace(context, config=config))
    ways: Mapping[str, Callable[[SharingContext], SharingWay]]
    ways = {"own": OwnSharing, "combined": CombinedSharing, "tied": TiedSharing}
    return ways[group](context)


class MappedSharing:
    """Hands each layer to its way, which sees its own layers alone; see `way.SharingWay`."""

    def __init__(self, context: SharingContext):
        layers: dict[str, list[int]] = {}
        for moe_index, source in enumerate(context.sources):
            layers.setdefault(_group(source), []).append(moe_index)
        self._ways = {group: _way(group, context.of_layers(own)) for group, own in layers.items()}
        #: Group of each layer, and the layer's place in it.
        self._places = {i: (group, place) for group, own in layers.items() for place, i in enumerate(own)}

    def layer_part(self, moe_index: int) -> nn.Module:
        """Returns what the layer's way says."""
        group, place = self._places[moe_index]
        return self._ways[group].layer_part(place)

    def shared_part(self) -> nn.ModuleDict:
        """Returns the pool as `combined` and the sets by number as `set`, as far as there are any."""
        parts, sets = nn.ModuleDict(), nn.ModuleDict()
        for group, way in self._ways.items():
            part = way.shared_part()
            if part is None:
                continue
            if group == "tied":
                sets.update(part)  # type: ignore[arg-type]
            elif group == "combined":
                parts["combined"] = part
            else:
                sets[group.removeprefix("scaled ")] = part
        if len(sets):
            parts["set"] = sets
        return parts

    def lender(self, layer_parts: Mapping[int, nn.Module], shared_part: nn.Module | None) -> MappedLender:
        """Returns the lenders of all ways as one."""
        assert isinstance(shared_part, nn.ModuleDict)
        lenders: dict[str, ExpertLender] = {}
        for group, way in self._ways.items():
            own = {self._places[i][1]: part for i, part in layer_parts.items() if self._places[i][0] == group}
            lenders[group] = way.lender(own, self._shared_of(group, shared_part))
        return MappedLender(lenders, self._places)

    def _shared_of(self, group: str, parts: nn.ModuleDict) -> nn.Module | None:
        sets = parts["set"] if "set" in parts else nn.ModuleDict()
        assert isinstance(sets, nn.ModuleDict)
        if group == "tied":
            return sets
        if group == "combined":
            return parts["combined"]
        number = group.removeprefix("scaled ")
        return sets[number] if number in sets else None


class MappedLender:
    """See `way.ExpertLender`.

    Attributes:
        lenders: by group of layers.
        places: group of each layer of the whole model, and the layer's place in it.
    """

    def __init__(self, lenders: MutableMapping[str, ExpertLender], places: Mapping[int, tuple[str, int]]):
        self.lenders, self.places = lenders, places

    def begin_step(self) -> None:
        """All ways take in their weights."""
        for lender in self.lenders.values():
            lender.begin_step()

    def experts(self, moe_index: int) -> Experts:
        """Returns a layer's experts from its own way."""
        group, place = self.places[moe_index]
        return self.lenders[group].experts(place)

    def finish_step(self) -> None:
        """All ways complete their gradients."""
        for lender in self.lenders.values():
            lender.finish_step()

    def costs(self) -> LenderCosts:
        """Returns the costs of all ways."""
        return LenderCosts.of_all([lender.costs() for lender in self.lenders.values()])
