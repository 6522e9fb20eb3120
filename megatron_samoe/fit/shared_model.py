"""The models that a fit makes: one in a common numbering, which computes the same, and one whose layers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import ExpertSource
from megatron_samoe.convert.edited_model import EditedModel, add_fractions, begin_edit, source_config
from megatron_samoe.convert.layer_experts import LayerExperts, is_experts, stored_experts
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.fit.bank_fit import BankFit
from megatron_samoe.fit.numbering import Numbering
from megatron_samoe.models.layer_layout import LayerSpec
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT


@dataclass(frozen=True)
class SharedGroup:
    """MoE layers that share one source.

    Attributes:
        layers: their numbers among the MoE layers.
        num_banks: that they mix; a set is one.
    """

    source: ExpertSource
    layers: Sequence[int]
    num_banks: int = 1


def shared_groups(sources: Sequence[ExpertSource], num_banks: int) -> list[SharedGroup]:
    """Returns the layers that share, by what they share, in the order of first use.

    Args:
        sources: of each MoE layer.
    """
    return [
        SharedGroup(source, [n for n, s in enumerate(sources) if s == source], num_banks if source.way.combines else 1)
        for source in dict.fromkeys(sources)
        if source.way.is_shared
    ]


def with_numberings(source: GlobalTensors, config: PretrainConfig, numberings: Mapping[int, Numbering]) -> EditedModel:
    """Returns a MoE whose experts, their neurons and routers are in a new order, or some of them.

    Args:
        config: of the new model.
        numberings: by MoE layer; others stay as they are.
    """
    edited, experts = begin_edit(source, config), LayerExperts(source)
    for index, numbers in numberings.items():
        place = experts.layers[index]
        names = [f"layers.{place.index}.moe.router.{kind}" for kind in Router.by_expert]
        for name in [*names, *(stored_experts(place) + kind for kind in experts.kinds)]:
            if stored := source.tensors.get(name):
                shape = (len(numbers.experts_E), *stored.shape[1:])
                edited.add(name, shape, stored.dtype, partial(_numbered, source, name, numbers))
    kept = [
        numberings[i].experts_E if i in numberings else torch.arange(p.num_experts)
        for i, p in enumerate(experts.layers)
    ]
    counts = [len(kept_E) for kept_E in kept]
    order_LE = torch.arange(max(counts)).repeat(len(counts), 1)
    for order_E, kept_E in zip(order_LE, kept, strict=True):
        order_E[: len(kept_E)] = kept_E
    add_fractions(edited, source, counts, order_LE)
    return edited


def _numbered(source: GlobalTensors, name: str, numbers: Numbering) -> Tensor:
    values_E = source.read(name)
    return numbers.applied(name.rpartition(".")[2], values_E) if is_experts(name) else values_E[numbers.experts_E]


def renumbered_model(source: GlobalTensors, numberings: Mapping[int, Numbering]) -> EditedModel:
    """Returns a MoE that computes the same, its experts, their neurons and its routers in a new order.

    Args:
        numberings: by MoE layer; others stay as they are.
    """
    return with_numberings(source, source_config(source), numberings)


@dataclass(frozen=True)
class FittedGroup:
    """MoE layers that share, with the fits of w1 and b1, and of w2 and b2."""

    group: SharedGroup
    fits: Sequence[BankFit]

    def bank(self, experts: LayerExperts, kind: str) -> Tensor:
        """Returns a kind of tensor of what is shared, [P, E, ...]."""
        fit, places = self.fits[ROW_OF_WEIGHT[kind]], [experts.layers[index] for index in self.group.layers]
        if fit.is_mixture:
            return _mixed(fit.banks, experts, places, kind)
        shape = experts.shape(places[0], kind)
        # A bias is the last column of its matrix.
        part = fit.banks[..., : shape[-1]] if kind[0] == "w" else fit.banks[..., -1]
        return part.reshape(len(fit.banks), *shape).float()


def shared_model(
    source: GlobalTensors, config: PretrainConfig, sources: Sequence[ExpertSource], fitted: Sequence[FittedGroup]
) -> EditedModel:
    """Returns a MoE whose layers share banks and sets that replace their experts.

    Args:
        source: the MoE, in the numbering that the groups were fitted in.
        config: of the new model.
        sources: of each MoE layer.
    """
    experts = LayerExperts(source)
    of_layer = {experts.layers[index].index: one for one in fitted for index in one.group.layers}

    def whole(place: LayerSpec, kind: str) -> Tensor:
        found = of_layer.get(place.index)
        return experts.whole(place, kind) if found is None else found.bank(experts, kind)

    edited = experts.reshared(config, sources, whole)
    for one in fitted:
        for number, index in enumerate(one.group.layers if one.group.source.way.mixes else ()):
            a_2GP = torch.stack([fit.coefficients_LGP[number] for fit in one.fits]).float()
            edited.add_value(f"layers.{experts.layers[index].index}.moe.combination", a_2GP)
    return edited


def _mixed(mixture_PGL: Tensor, experts: LayerExperts, places: Sequence[LayerSpec], kind: str) -> Tensor:
    """Returns mixtures of layers' experts, which are read one after the other."""
    bank_PE = torch.zeros(len(mixture_PGL), *experts.shape(places[0], kind))
    for number, place in enumerate(places):
        factor_PG = mixture_PGL[:, :, number]
        if factor_PG.any():
            # G is E or, with 1, serves all experts.
            factor_PG = factor_PG.float()[(..., *[None] * (bank_PE.dim() - 2))]
            bank_PE.addcmul_(factor_PG, experts.read(place, kind).float())
    return bank_PE
