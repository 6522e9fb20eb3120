"""The ways of sharing of one model, each for the layers that --expert-sharing gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from megatron_samoe.config.sharing_map import COMBINED, OWN, SCALED, TIED, ExpertSource, Way
from megatron_samoe.moe.sharing.combined import CombinedSharing
from megatron_samoe.moe.sharing.own import OwnSharing
from megatron_samoe.moe.sharing.tied import TiedSharing
from megatron_samoe.moe.sharing.way import ExpertLender, LenderCosts, Mixture, SharingContext, SharingWay
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.grouped_mlp import ExpertWeights


def _scaled(context: SharingContext) -> SharingWay:
    """A set with factors is a pool of one bank, whose coefficients are the factors; nothing is combined to serve it."""
    config = replace(
        context.config, num_expert_banks=1, samoe_granularity="layer", samoe_normalization="none", samoe_init="cyclic"
    )
    serving = None if context.serving is None else "selected"
    return CombinedSharing(replace(context, config=config, serving=serving))  # type: ignore[arg-type]


_MAKE: Mapping[Way, Callable[[SharingContext], SharingWay]] = {
    OWN: OwnSharing,
    COMBINED: CombinedSharing,
    TIED: TiedSharing,
    SCALED: _scaled,
}


class MappedSharing:
    """Hands each layer to the way of its source, which sees only the layers of this source; see `way.SharingWay`."""

    def __init__(self, context: SharingContext):
        layers: dict[ExpertSource, list[int]] = {}
        for moe_index, source in enumerate(context.sources):
            layers.setdefault(source, []).append(moe_index)
        self._ways = {s: (s.way.make or _MAKE[s.way])(context.of_layers(users)) for s, users in layers.items()}
        #: ExpertSource of each layer, and the layer's index among the source's.
        self._positions = {
            i: (source, position) for source, users in layers.items() for position, i in enumerate(users)
        }

    def layer_part(self, moe_index: int) -> nn.Module:
        """Returns what the layer's way says."""
        source, position = self._positions[moe_index]
        return self._ways[source].layer_part(position)

    def shared_part(self) -> nn.ModuleDict | None:
        """Returns what ways share by their names, and sets by number as `set`; None where there is nothing on this rank."""
        parts, sets = nn.ModuleDict(), nn.ModuleDict()
        for source, way in self._ways.items():
            if (part := way.shared_part()) is not None:
                found, key = (sets, str(source.number)) if source.way.in_sets else (parts, source.way.name)
                found[key] = part
        if len(sets):
            parts["set"] = sets
        return parts if len(parts) else None

    def lender(self, layer_parts: Mapping[int, nn.Module], shared_part: nn.Module | None) -> MappedLender:
        """Returns the lenders of all ways as one, except of sets that only other stages use."""
        lenders: dict[ExpertSource, ExpertLender] = {}
        for source, way in self._ways.items():
            own = {self._positions[i][1]: part for i, part in layer_parts.items() if self._positions[i][0] == source}
            shared = _shared_of(source, shared_part)
            if shared is not None or not source.way.in_sets:
                lenders[source] = way.lender(own, shared)
        return MappedLender(lenders, self._positions)

    def mixture(self, moe_index: int, layer_part: nn.Module, shared_part: nn.Module | None) -> Mixture:
        """Returns what the layer's way says."""
        source, position = self._positions[moe_index]
        return self._ways[source].mixture(position, layer_part, _shared_of(source, shared_part))


def _shared_of(source: ExpertSource, parts: nn.Module | None) -> nn.Module | None:
    """Returns the part of one source; None where it has none on this rank."""
    path = ("set", str(source.number)) if source.way.in_sets else (source.way.name,)
    for name in path:
        parts = None if parts is None else dict(parts.named_children()).get(name)
    return parts


class MappedLender:
    """See `way.ExpertLender`.

    Attributes:
        lenders: of each source that this rank has or uses.
        positions: source of each layer of the model, and the layer's index among the source's.
    """

    def __init__(self, lenders: Mapping[ExpertSource, ExpertLender], positions: Mapping[int, tuple[ExpertSource, int]]):
        self.lenders, self.positions = lenders, positions

    def begin_step(self) -> None:
        """All ways take in their weights."""
        for lender in self.lenders.values():
            lender.begin_step()

    def experts(self, moe_index: int) -> Experts:
        """Returns a layer's experts from its own way."""
        source, position = self.positions[moe_index]
        return self.lenders[source].experts(position)

    def finish_step(self) -> None:
        """All ways complete their gradients."""
        for lender in self.lenders.values():
            lender.finish_step()

    def costs(self) -> LenderCosts:
        """Returns the costs of all ways."""
        return LenderCosts.of_all([lender.costs() for lender in self.lenders.values()])

    def layer_gradients(self) -> dict[int, ExpertWeights] | None:
        """Returns those of all ways; None where a way keeps none, on this rank or another: all ranks give the same answer."""
        found = {source: lender.layer_gradients() for source, lender in self.lenders.items()}
        kept = {source: grads for source, grads in found.items() if grads is not None}
        if len(kept) < len({source for source, _ in self.positions.values()}):
            return None
        layers = {position: moe_index for moe_index, position in self.positions.items()}
        return {layers[source, i]: grads for source, by_position in kept.items() for i, grads in by_position.items()}
