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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import COMBINED, Source, parse_sharing
from megatron_samoe.convert.edited_model import EditedModel, require, source_config, validate_model, with_sharing
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.layer_experts import LayerExperts
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.fit.bank_fit import BankFit, fit_banks, fit_set
from megatron_samoe.fit.gram import gram_of_row
from megatron_samoe.fit.matching_by_weights import match_by_weights, role_gram
from megatron_samoe.fit.numbering import Numbering
from megatron_samoe.fit.shared_model import FittedGroup, mixed_bank, renumbered_model, shared_model
from megatron_samoe.models.layer_layout import LayerPlace

Granularity = Literal["layer", "expert"]


@dataclass(frozen=True)
class SetOptions:
    """How sets are made.

    Attributes:
        num_sets, untied_ends: where --expert-sharing is no map.
        layers: of each set, the layer (among all) whose experts it takes; None for the average of its layers.
    """

    num_sets: int = 1
    untied_ends: int = 0
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SharedGroup:
    """MoE layers that share, and what of.

    Attributes:
        anchor: place among the layers of the one that a set is taken from.
    """

    source: Source
    layers: list[LayerPlace]
    num_banks: int = 1
    per_expert: bool = False
    anchor: int | None = None

    @property
    def named(self) -> str:
        """The banks or the set, for a user."""
        return f"{self.num_banks} banks" if self.source.way.combines else f"set {self.source.number}"


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
    experts = LayerExperts(source)
    sources = parse_sharing(sharing, len(experts.layers), options.num_sets, options.untied_ends)
    groups = _groups(config, experts.layers, sources, sharing, options, action)
    new = with_sharing(config, sources)
    validate_model(new)
    numberings: dict[int, Numbering] = {}
    fitted = []
    for group in groups:
        numbers, fits = _fit(experts, group, config.moe.moe_router_num_groups or 1)
        members = [place.moe_index or 0 for place in group.layers]
        numberings |= dict(zip(members, numbers, strict=True))
        fitted.append(FittedGroup(group.source, members, fits, mixed_bank))
    edited = shared_model(renumbered_model(source, numberings), new, sources, fitted)
    edited.report += [*report, *_report(groups, fitted, numberings, action)]
    return edited


def _groups(
    config: PretrainConfig,
    layers: Sequence[LayerPlace],
    sources: Sequence[Source],
    sharing: str,
    options: SetOptions,
    action: str,
) -> list[SharedGroup]:
    moe, ways = config.moe, {source.way for source in sources}
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
    numbers = sorted({source.number for source in sources if source.way.in_sets})
    if options.layers is not None and len(options.layers) != len(numbers):
        raise ConfigError("--sets-from", list(options.layers), f"must name a layer for each of sets {numbers}")
    groups = []
    for source in sorted({s for s in sources if s.way.is_shared}, key=lambda s: (s.way.name, s.number)):
        used_by = [place for place, own in zip(layers, sources, strict=True) if own == source]
        if source.way.combines:
            if not 1 <= moe.num_expert_banks <= len(used_by):
                raise ConfigError(
                    "--num-expert-banks",
                    moe.num_expert_banks,
                    f"must be from 1 to the number of MoE layers that combine them, {len(used_by)}",
                )
            if moe.moe_router_num_groups is not None:
                raise ConfigError(
                    "--moe-router-num-groups",
                    moe.moe_router_num_groups,
                    "cannot be kept by pool, which renumbers experts across groups; tie keeps groups",
                )
            groups.append(SharedGroup(source, used_by, moe.num_expert_banks, moe.samoe_granularity == "expert"))
            continue
        anchor = None
        if options.layers is not None:
            indices, chosen = [place.index for place in used_by], options.layers[numbers.index(source.number)]
            if chosen not in indices:
                raise ConfigError("--sets-from", chosen, f"must be one of set {source.number}'s layers, {indices}")
            anchor = indices.index(chosen)
        groups.append(SharedGroup(source, used_by, anchor=anchor))
    return groups


def _fit(experts: LayerExperts, group: SharedGroup, expert_groups: int) -> tuple[list[Numbering], list[BankFit]]:
    """Returns the common numbering of a group's layers, and the banks of w1 and b1, and of w2 and b2."""

    def read(kind: str, number: int) -> Tensor:
        return experts.read(group.layers[number], kind).flatten(1)

    first = group.layers[0]
    grams = [gram_of_row(read, experts.kinds, row, len(group.layers), first.num_experts) for row in (0, 1)]
    way = group.source.way
    order_LE = match_by_weights(grams, way, group.num_banks, expert_groups, group.anchor)
    own = Numbering.own(first.num_experts, experts.shape(first, "w2")[-1])
    fits = []
    for gram in grams:
        gram_GLL = role_gram(gram, order_LE, group.per_expert)
        is_best = way.mixes and group.anchor is None
        fits.append(fit_banks(gram_GLL, group.num_banks) if is_best else fit_set(gram_GLL[0], group.anchor, way.mixes))
    return [replace(own, experts_E=order_E) for order_E in order_LE], fits


def _report(
    groups: Sequence[SharedGroup], fitted: Sequence[FittedGroup], numberings: Mapping[int, Numbering], action: str
) -> Iterator[str]:
    for group, found in zip(groups, fitted, strict=True):
        count = group.layers[0].num_experts
        yield f"{action}: {len(group.layers)} layers of {count} experts into {group.named} of as many."
        yield f"layer  experts renumbered  {LOST}"
        for place, index, lost in zip(group.layers, found.layers, losses(found.fits), strict=True):
            moved = int((numberings[index].experts_E != torch.arange(count)).sum())
            yield f"{place.index:5}  {moved:18}  {lost}"
        total = [fit.relative for fit in found.fits]
        yield f"{'all':>5}  {'':18}  {total[0]:14.2e}  {total[1]:14.2e}"


#: Head of the columns that `losses` fills.
LOST = "lost of w1, b1  lost of w2, b2   (norm of the difference / norm)"


def losses(fits: Sequence[BankFit]) -> list[str]:
    """Returns for each layer what it loses of w1, b1 and of w2, b2."""
    return [f"{a:14.2e}  {b:14.2e}" for a, b in zip(*(fit.relative_L.tolist() for fit in fits), strict=True)]
