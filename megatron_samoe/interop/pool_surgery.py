"""A trained MoE whose layers come to share experts: the nearest one in which they do, by a sharing map.

Experts of different layers have no common numbering, so those of layers that will share are first matched
(`bank_fit.match_experts` for mixtures of banks, `match_to_mean` for sets) and their routers' rows are reordered likewise,
which changes nothing. Then:

    combined    layers are projected on the P banks that lose least, w1 and b1 with one set of coefficients, w2 and b2 with
                another, as SaMoE computes. A MoE whose experts are combinations of P banks comes back up to rounding;
    tied        a set is the average of its layers, or one layer's experts;
    scaled      a set is the one bank that loses least, or one layer's experts, and each layer gets the best factors.

Layers that own their experts keep them. Neurons within an expert are not matched: the numbering of its F hidden units is taken
as it is. A model whose layers share already is folded first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import COMBINED, Source, parse_sharing
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.interop.bank_fit import BankFit, fit_banks, match_experts, match_to_mean, role_gram
from megatron_samoe.interop.edited_model import (
    EditedModel,
    add_fractions,
    begin_edit,
    model_names,
    require,
    source_config,
    with_sharing,
)
from megatron_samoe.interop.gram import inner_products
from megatron_samoe.interop.layer_experts import LayerExperts, is_experts, layer_of
from megatron_samoe.interop.unpool_surgery import fold_shared
from megatron_samoe.models.layer_layout import LayerPlace
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT

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
    def stored(self) -> str:
        """What the names of the shared tensors begin with."""
        return self.source.stored(0)

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
) -> EditedModel:  # fmt: skip
    experts = LayerExperts(source)
    sources = parse_sharing(sharing, len(experts.layers), options.num_sets, options.untied_ends)
    groups = _groups(config, experts.layers, sources, sharing, options, action)
    edited = begin_edit(source, with_sharing(config, sources))
    order_LE = torch.arange(max(place.num_experts for place in experts.layers)).repeat(len(sources), 1)
    fits = []
    for group in groups:
        order_lE, fit = _fit(source, experts, group, config.moe.moe_router_num_groups)
        members = [place.moe_index for place in group.layers]
        order_LE[members, : order_lE.shape[1]] = order_lE
        fits.append(fit)
    _add_layers(edited, source, experts, sources, order_LE)
    for group, fit in zip(groups, fits, strict=True):
        add_shared(edited, experts, group, order_LE, fit)
    add_fractions(edited, source, [place.num_experts for place in experts.layers], order_LE)
    edited.report += [*report, *_report(groups, order_LE, fits, action)]
    return edited


def _groups(
    config: PretrainConfig, layers: Sequence[LayerPlace], sources: Sequence[Source], sharing: str, options: SetOptions,
    action: str,
) -> list[SharedGroup]:  # fmt: skip
    moe, ways = config.moe, {source.way for source in sources}
    if foreign := [way.name for way in ways if way.make is not None]:
        raise ConfigError("--expert-sharing", sharing, f"must not have {foreign[0]}, which is of another package: {action} "
                          "fits pools and sets")  # fmt: skip
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
                raise ConfigError("--num-expert-banks", moe.num_expert_banks, "must be from 1 to the number of MoE layers that "
                                  f"combine them, {len(used_by)}")  # fmt: skip
            if moe.moe_router_num_groups is not None:
                raise ConfigError("--moe-router-num-groups", moe.moe_router_num_groups, "cannot be kept by pool, which "
                                  "renumbers experts across groups; tie keeps groups")  # fmt: skip
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


def _fit(
    source: GlobalTensors, experts: LayerExperts, group: SharedGroup, expert_groups: int | None
) -> tuple[Tensor, list[BankFit]]:
    """Returns the common numbering of a group's experts, [layers, E], and the banks of w1 and b1, and of w2 and b2."""

    def read(kind: str, number: int) -> Tensor:
        return experts.read(group.layers[number], kind).flatten(1)

    count = group.layers[0].num_experts
    grams = [gram_of_row(read, experts.kinds, row, len(group.layers), count) for row in (0, 1)]
    if group.source.way.combines:
        order_LE = match_experts(grams, group.num_banks)
        return order_LE, [fit_banks(role_gram(gram, order_LE, group.per_expert), group.num_banks) for gram in grams]
    order_LE = match_to_mean(grams, expert_groups or 1, group.anchor)
    return order_LE, [_fit_set(role_gram(gram, order_LE, per_expert=False), group) for gram in grams]


def gram_of_row(
    read: Callable[[str, int], Tensor], kinds: Sequence[str], row: int, num_layers: int, num_experts: int
) -> Tensor:
    """Returns inner products over the tensors that share a row of coefficients; `read` gives [E, n] of a kind and layer."""
    chosen = [kind for kind in kinds if ROW_OF_WEIGHT[kind] == row]
    return torch.stack([inner_products(partial(read, kind), num_layers, num_experts) for kind in chosen]).sum(0)


def _fit_set(gram_GLL: Tensor, group: SharedGroup) -> BankFit:
    """Returns the set as one bank, whose coefficients are 1 for a tied one."""
    gram_LL, count, is_scaled = gram_GLL[0], len(group.layers), group.source.way.mixes
    if is_scaled and group.anchor is None:
        return fit_banks(gram_GLL, 1)
    mixture_L = torch.full((count,), 1.0 / count).double()
    if group.anchor is not None:
        mixture_L = torch.nn.functional.one_hot(torch.tensor(group.anchor), count).double()
    along_L = gram_LL @ mixture_L
    factor_L = along_L / (mixture_L @ along_L).clamp_min(1e-300) if is_scaled else torch.ones(count).double()
    rest_LL = torch.eye(count).double() - factor_L[:, None] * mixture_L
    lost_L = torch.einsum("li,ij,lj->l", rest_LL, gram_LL, rest_LL).clamp_min(0)
    norm_L = gram_LL.diagonal()
    lost_L = lost_L / norm_L.clamp_min(1e-300)
    return BankFit(factor_L[:, None, None], mixture_L[None, None], lost_L[:, None], norm_L[:, None])


def _add_layers(
    edited: EditedModel, source: GlobalTensors, experts: LayerExperts, sources: Sequence[Source], order_LE: Tensor
) -> None:
    """Adds all but what is shared; experts of layers that share are left out, and their routers' rows reordered."""
    shares: dict[int | None, LayerPlace] = {
        p.index: p for p, s in zip(experts.layers, sources, strict=True) if s.way.is_shared
    }
    for name in model_names(source):
        place = shares.get(layer_of(name))
        if place is None:
            edited.keep(source, name)
        elif name.endswith((".router.weight", ".router.expert_bias")):
            order_E, stored = order_LE[place.moe_index, : place.num_experts], source.tensors[name]
            edited.add(name, stored.shape, stored.dtype, partial(_rows, source, name, order_E))
        elif not is_experts(name):
            edited.keep(source, name)


def _rows(source: GlobalTensors, name: str, order_E: Tensor) -> Tensor:
    return source.read(name)[order_E]


def add_shared(
    edited: EditedModel, experts: LayerExperts, group: SharedGroup, order_LE: Tensor, fits: Sequence[BankFit]
) -> None:
    """Adds a group's coefficients, and its banks or its set as mixtures of its layers' experts in their common order."""
    if group.source.way.mixes:
        for number, place in enumerate(group.layers):
            groups = place.num_experts if group.per_expert else 1
            a_2GP = torch.stack([fit.coefficients_LGP[number].expand(groups, -1) for fit in fits]).float()
            edited.add_value(f"layers.{place.index}.moe.combination", a_2GP)
    for kind in experts.kinds:
        mixture_PGL = fits[ROW_OF_WEIGHT[kind]].mixture_PGL
        shape = (group.num_banks, *experts.shape(group.layers[0], kind))

        def mixed(kind: str = kind, mixture_PGL: Tensor = mixture_PGL, shape: tuple[int, ...] = shape) -> Tensor:
            bank = torch.zeros(shape)
            for number, place in enumerate(group.layers):
                if mixture_PGL[:, :, number].any():
                    order_E = order_LE[place.moe_index, : place.num_experts]
                    add_mixed(bank, mixture_PGL[:, :, number], experts.read(place, kind)[order_E].float())
            return bank

        # What is shared is its own master weight, fp32 in every precision.
        edited.add(group.stored + kind, shape, torch.float32, mixed)


def add_mixed(bank_PE: Tensor, factor_PG: Tensor, weights_E: Tensor) -> None:
    """Adds factor[p, g] * weights[e] to bank[p, e], where g is e or, with G = 1, all."""
    num_experts = weights_E.shape[0]
    for bank_E, factor_G in zip(bank_PE, factor_PG.expand(-1, num_experts), strict=True):
        for expert in range(num_experts):
            if factor := float(factor_G[expert]):
                bank_E[expert].add_(weights_E[expert], alpha=factor)


def _report(
    groups: Sequence[SharedGroup], order_LE: Tensor, fits: Sequence[Sequence[BankFit]], action: str
) -> Iterator[str]:
    for group, pair in zip(groups, fits, strict=True):
        count = group.layers[0].num_experts
        yield f"{action}: {len(group.layers)} layers of {count} experts into {group.named} of as many."
        yield f"layer  experts renumbered  {LOST}"
        for place, lost in zip(group.layers, losses(pair), strict=True):
            moved = int((order_LE[place.moe_index, :count] != torch.arange(count)).sum())
            yield f"{place.index:5}  {moved:18}  {lost}"
        total = [float(((f.lost_LG * f.norm_LG).sum() / f.norm_LG.sum()).sqrt()) for f in pair]
        yield f"{'all':>5}  {'':18}  {total[0]:14.2e}  {total[1]:14.2e}"


#: Head of the columns that `losses` fills.
LOST = "lost of w1, b1  lost of w2, b2   (norm of the difference / norm)"


def losses(fits: Sequence[BankFit]) -> list[str]:
    """Returns for each layer what it loses of w1, b1 and of w2, b2."""
    return [f"{a:14.2e}  {b:14.2e}" for a, b in zip(*(fit.relative_error_L.tolist() for fit in fits), strict=True)]
