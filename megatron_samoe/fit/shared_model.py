"""The models that a fit makes: one in a common numbering, which computes the same, and one whose layers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import Source
from megatron_samoe.convert.edited_model import EditedModel, add_fractions, begin_edit, model_names, source_config
from megatron_samoe.convert.layer_experts import LayerExperts, is_experts, layer_of
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.fit.bank_fit import BankFit
from megatron_samoe.fit.numbering import Numbering
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT


def renumbered_model(source: GlobalTensors, numberings: Mapping[int, Numbering]) -> EditedModel:
    """Returns a MoE that computes the same, its experts, their neurons and its routers in a new order.

    Args:
        numberings: by MoE layer; others stay as they are.
    """
    experts = LayerExperts(source)
    edited = begin_edit(source, source_config(source))
    of_layer = {experts.layers[index].index: numbers for index, numbers in numberings.items()}
    for name in model_names(source):
        layer, last = layer_of(name), name.rpartition(".")[2]
        numbers = None if layer is None else of_layer.get(layer)
        is_by_expert = ".moe.router." in name and last in Router.by_expert
        if numbers is not None and (is_by_expert or is_experts(name)):
            stored = source.tensors[name]
            edited.add(name, stored.shape, stored.dtype, partial(_renumbered, source, name, numbers))
        else:
            edited.keep(source, name)
    counts = [place.num_experts for place in experts.layers]
    order_LE = torch.arange(max(counts)).repeat(len(counts), 1)
    for index, numbers in numberings.items():
        order_LE[index, : counts[index]] = numbers.experts_E
    add_fractions(edited, source, counts, order_LE)
    return edited


def _renumbered(source: GlobalTensors, name: str, numbers: Numbering) -> Tensor:
    values_E = source.read(name)
    return numbers.applied(name.rpartition(".")[2], values_E) if is_experts(name) else values_E[numbers.experts_E]


@dataclass(frozen=True)
class FittedGroup:
    """MoE layers that share one source, with the fits of w1 and b1, and of w2 and b2.

    Attributes:
        layers: their numbers among the MoE layers.
        bank: gives a kind of tensor of what is shared, [P, E, ...]: `mixed_bank` or `fitted_bank`.
    """

    source: Source
    layers: Sequence[int]
    fits: Sequence[BankFit]
    bank: Callable[[FittedGroup, LayerExperts, str], Tensor]


def shared_model(
    source: GlobalTensors, config: PretrainConfig, sources: Sequence[Source], groups: Sequence[FittedGroup]
) -> EditedModel:
    """Returns a MoE with banks and sets in place of the experts of layers that share.

    Args:
        source: the MoE, in the numbering that the groups were fitted in.
        config: of the new model.
        sources: of each MoE layer.
    """
    edited, experts = begin_edit(source, config), LayerExperts(source)
    own = {place.index for place, s in zip(experts.layers, sources, strict=True) if not s.way.is_shared}
    for name in model_names(source):
        if not is_experts(name) or layer_of(name) in own:
            edited.keep(source, name)
    for group in groups:
        add_group(edited, experts, group)
    add_fractions(edited, source, [place.num_experts for place in experts.layers])
    return edited


def add_group(edited: EditedModel, experts: LayerExperts, group: FittedGroup) -> None:
    """Adds the coefficients of a group's layers, and its banks or its set."""
    places = [experts.layers[index] for index in group.layers]
    if group.source.way.mixes:
        for number, place in enumerate(places):
            a_2GP = torch.stack([fit.coefficients_LGP[number] for fit in group.fits]).float()
            edited.add_value(f"layers.{place.index}.moe.combination", a_2GP)
    num_banks = group.fits[0].coefficients_LGP.shape[2]
    for kind in experts.kinds:
        shape = (num_banks, *experts.shape(places[0], kind))
        # What is shared is its own master weight, fp32 in every precision.
        edited.add(group.source.stored(0) + kind, shape, torch.float32, partial(group.bank, group, experts, kind))


def fitted_bank(group: FittedGroup, experts: LayerExperts, kind: str) -> Tensor:
    """Returns banks of a fit with moments; a bias is the last column of its matrix."""
    bank_PEUD = group.fits[ROW_OF_WEIGHT[kind]].banks
    shape = experts.shape(experts.layers[group.layers[0]], kind)
    part = bank_PEUD[..., : shape[-1]] if kind[0] == "w" else bank_PEUD[..., -1]
    return part.reshape(len(bank_PEUD), *shape).float()


def mixed_bank(group: FittedGroup, experts: LayerExperts, kind: str) -> Tensor:
    """Returns banks of a fit without moments, mixtures of the layers' experts, which are read one after the other."""
    mixture_PGL = group.fits[ROW_OF_WEIGHT[kind]].banks
    bank = torch.zeros(len(mixture_PGL), *experts.shape(experts.layers[group.layers[0]], kind))
    for number, index in enumerate(group.layers):
        factor_PG = mixture_PGL[:, :, number]
        if factor_PG.any():
            _add_mixed(bank, factor_PG, experts.read(experts.layers[index], kind).float())
    return bank


def _add_mixed(bank_PE: Tensor, factor_PG: Tensor, weights_E: Tensor) -> None:
    """Adds factor[p, g] * weights[e] to bank[p, e], where g is e or, with G = 1, all."""
    num_experts = weights_E.shape[0]
    for bank_E, factor_G in zip(bank_PE, factor_PG.expand(-1, num_experts), strict=True):
        for expert in range(num_experts):
            if factor := float(factor_G[expert]):
                bank_E[expert].add_(weights_E[expert], alpha=factor)
