"""A trained MoE whose layers come to share experts: the nearest one in which they do, by a sharing map.

Experts of different layers have no common numbering, so those of layers that will share are first matched
(`matching_by_weights`) and their routers' rows are reordered likewise,
which changes nothing. Then:

    combined    layers are projected on the P banks that lose least, w1 and b1 with one set of coefficients, w2 and b2 with
                another, as SaMoE computes. A MoE whose experts are combinations of P banks comes back up to rounding;
    tied        a set is the average of its layers, or one layer's experts;
    scaled      a set is the one bank that loses least, or one layer's experts, and each layer gets the best factors.

Layers that own their experts keep them. Neurons within an expert are not matched: the numbering of its F hidden units is taken
as it is. A model whose layers share already is folded first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import COMBINED, ExpertSource, Way, parse_sharing
from megatron_samoe.convert.edited_model import EditedModel, require, source_config, validate_model, with_sharing
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.layer_experts import LayerExperts
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.fit.bank_fit import BankFit, fit_banks, fit_set
from megatron_samoe.fit.gram import gram_of_row
from megatron_samoe.fit.matching_by_weights import match_by_weights, role_gram
from megatron_samoe.fit.numbering import Numbering
from megatron_samoe.fit.shared_model import FittedGroup, SharedGroup, renumbered_model, shared_groups, shared_model

Granularity = Literal["layer", "expert"]


@dataclass(frozen=True)
class SetOptions:
    """How sets are made.

    Attributes:
        num_sets, untied_ends: where --expert-sharing is not a map.
        layers: of each set, the layer (among all) whose experts it takes; None for the average of its layers.
    """

    num_sets: int = 1
    untied_ends: int = 0
    layers: tuple[int, ...] | None = None


def pool_moe(
    source: GlobalTensors, num_banks: int, granularity: Granularity = "layer", sharing: str = COMBINED.name
) -> EditedModel:
    """Returns the SaMoE of `num_banks` banks that is nearest to a MoE; all inner products are taken now.

    Args:
        granularity: one set of coefficients per layer, or per layer and expert.
        sharing: combined, or a map of combined layers and others.

    Raises:
        ConfigError: the source has no experts, the map does not fit it, or fewer layers combine than there are banks.
    """
    config, source, report = _standard(source, "pool")
    moe = replace(config.moe, num_expert_banks=num_banks, samoe_granularity=granularity)
    return _share(replace(config, moe=moe), source, sharing, SetOptions(), "pool", report)


def tie_layers(source: GlobalTensors, sharing: str, options: SetOptions | None = None) -> EditedModel:
    """Returns the model nearest to a MoE whose layers use sets by a map; all inner products are taken now.

    Raises:
        ConfigError: the source has no experts, the map does not fit it, or it has combined layers.
    """
    config, source, report = _standard(source, "tie")
    return _share(config, source, sharing, options or SetOptions(), "tie", report)


def _standard(source: GlobalTensors, action: str) -> tuple[PretrainConfig, GlobalTensors, list[str]]:
    """Returns a source whose layers own their experts, its configuration, and what was done for it."""
    config = source_config(source)
    require(config.moe.expert_layout != "dense", config, "expert_layout moe or samoe", action)
    if not config.moe.shares_experts:
        return config, source, []
    folded = fold_shared(source)
    return source_config(folded), folded, folded.report


def _share(
    config: PretrainConfig, source: GlobalTensors, sharing: str, options: SetOptions, action: str, report: Sequence[str]
) -> EditedModel:
    experts, moe = LayerExperts(source), config.moe
    sources = parse_sharing(sharing, len(experts.layers), options.num_sets, options.untied_ends)
    _refuse_ways({source.way for source in sources}, sharing, action)
    groups = shared_groups(sources, moe.num_expert_banks)
    groups.sort(key=lambda group: (group.source.way.name, group.source.number))
    anchors = _anchors(groups, experts, options)
    if moe.moe_router_num_groups is not None and any(group.source.way.combines for group in groups):
        raise ConfigError(
            "--moe-router-num-groups",
            moe.moe_router_num_groups,
            "cannot be kept by pool, which renumbers experts across groups; tie keeps groups",
        )
    new = with_sharing(config, sources)
    validate_model(new)
    numberings: dict[int, Numbering] = {}
    fitted = []
    for group in groups:
        found, fits = _fit(experts, group, moe, anchors.get(group.source))
        numberings |= dict(zip(group.layers, found, strict=True))
        fitted.append(FittedGroup(group, fits))
    edited = shared_model(renumbered_model(source, numberings), new, sources, fitted)
    edited.report += [*report, *_report(experts, fitted, numberings, action)]
    return edited


def _refuse_ways(ways: Collection[Way], sharing: str, action: str) -> None:
    if foreign := [way.name for way in ways if way.make is not None]:
        raise ConfigError(
            "--expert-sharing",
            sharing,
            f"must not have {foreign[0]}, which is of another package: {action} fits pools and sets",
        )
    combine, use_sets = any(way.combines for way in ways), any(way.in_sets for way in ways)
    if not combine if action == "pool" else combine or not use_sets:
        words = (
            "combined layers; tie makes sets" if action == "pool" else "sets, and no combined layers, which pool makes"
        )
        raise ConfigError("--expert-sharing", sharing, f"must have {words}")


def _anchors(groups: Sequence[SharedGroup], experts: LayerExperts, options: SetOptions) -> dict[ExpertSource, int]:
    """Returns for each set that takes a layer's experts the index of that layer among its own."""
    sets = [group for group in groups if group.source.way.in_sets]
    if options.layers is None:
        return {}
    numbers = [group.source.number for group in sets]
    if len(options.layers) != len(sets):
        raise ConfigError("--sets-from", list(options.layers), f"must name a layer for each of sets {numbers}")
    anchors = {}
    for group, chosen in zip(sets, options.layers, strict=True):
        indices = [experts.layers[index].index for index in group.layers]
        if chosen not in indices:
            raise ConfigError("--sets-from", chosen, f"must be one of set {group.source.number}'s layers, {indices}")
        anchors[group.source] = indices.index(chosen)
    return anchors


def _fit(
    experts: LayerExperts, group: SharedGroup, moe: MoEConfig, anchor: int | None
) -> tuple[list[Numbering], list[BankFit]]:
    """Returns the common numbering of a group's layers, and the banks of w1 and b1, and of w2 and b2.

    Args:
        anchor: index among the layers of the one that a set is taken from.
    """
    places, way = [experts.layers[index] for index in group.layers], group.source.way

    def read(kind: str, number: int) -> Tensor:
        return experts.read(places[number], kind).flatten(1)

    grams = [gram_of_row(read, experts.kinds, row, len(places), places[0].num_experts) for row in (0, 1)]
    order_LE = match_by_weights(grams, way, group.num_banks, moe.moe_router_num_groups or 1, anchor)
    fits = []
    for gram in grams:
        gram_GLL = role_gram(gram, order_LE, way.combines and moe.samoe_granularity == "expert")
        is_best = way.mixes and anchor is None
        fits.append(fit_banks(gram_GLL, group.num_banks) if is_best else fit_set(gram_GLL[0], anchor, way.mixes))
    ffn_size = experts.shape(places[0], "w2")[-1]
    return [Numbering.of_experts(order_E, ffn_size) for order_E in order_LE], fits


def _report(
    experts: LayerExperts, fitted: Sequence[FittedGroup], numberings: Mapping[int, Numbering], action: str
) -> Iterator[str]:
    for found in fitted:
        group = found.group
        named = f"{group.num_banks} banks" if group.source.way.combines else f"set {group.source.number}"
        count = experts.layers[group.layers[0]].num_experts
        yield f"{action}: {len(group.layers)} layers of {count} experts into {named} of as many."
        yield f"layer  experts renumbered  {LOST}"
        for index, lost in zip(group.layers, losses(found.fits), strict=True):
            yield f"{experts.layers[index].index:5}  {numberings[index].num_moved:18}  {lost}"
        total = [fit.relative for fit in found.fits]
        yield f"{'all':>5}  {'':18}  {total[0]:14.2e}  {total[1]:14.2e}"


#: Head of the columns that `losses` fills.
LOST = "lost of w1, b1  lost of w2, b2   (norm of the difference / norm)"


def losses(fits: Sequence[BankFit]) -> list[str]:
    """Returns for each layer what it loses of w1, b1 and of w2, b2."""
    return [f"{a:14.2e}  {b:14.2e}" for a, b in zip(*(fit.relative_L.tolist() for fit in fits), strict=True)]
