"""The models that compression writes: the original in a common numbering, and the one whose layers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_samoe.compress.matching import Numbering
from megatron_samoe.compress.weighted_fit import WeightedFit
from megatron_samoe.config.derived import experts_per_layer, num_moe_layers
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import Source
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.interop.edited_model import (
    EditedModel,
    add_fractions,
    begin_edit,
    compute_dtype,
    model_names,
    moe_layers,
    source_config,
    with_sharing,
)
from megatron_samoe.interop.layer_experts import LayerExperts, is_experts, layer_of
from megatron_samoe.models.layer_layout import LayerPlace
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT


def require_compressible(source: GlobalTensors) -> PretrainConfig:
    """Returns the configuration of a MoE whose layers own as many experts each; ConfigError for any other model."""
    config = source_config(source)
    moe = config.moe
    if moe.expert_layout == "dense":
        raise ConfigError("--load-dir", "a dense model", "must be a MoE: a dense model has no experts to share")
    if moe.shares_experts:
        raise ConfigError("--load-dir", f"a model whose layers share experts ({moe.sharing})", "must be a MoE whose layers own "
                          "their experts; megatron-samoe edit fold makes one")  # fmt: skip
    counts = experts_per_layer(moe, num_moe_layers(config))
    if len(set(counts)) != 1:
        raise ConfigError(
            "--load-dir", f"a MoE of {', '.join(map(str, counts))} experts by layer", "must have as many in each"
        )
    if len(counts) < 2:
        raise ConfigError("--load-dir", "a MoE of one MoE layer", "must have two MoE layers or more, which can share")
    return config


def expert_bytes(source: GlobalTensors) -> int:
    """Returns the bytes of all experts in the precision that the model computes in, with what says how layers use them."""
    width = compute_dtype(source).itemsize
    return sum(width * source.tensors[name].num_elements for name in model_names(source) if is_experts(name))


def renumbered_model(source: GlobalTensors, numberings: Mapping[int, Numbering]) -> EditedModel:
    """Returns a MoE that computes the same, its experts, their neurons and its routers in a new order.

    Args:
        numberings: by MoE layer; others stay as they are.
    """
    config, experts = source_config(source), LayerExperts(source)
    edited = begin_edit(source, config)
    of_layer = {place.index: numberings[i] for i, place in enumerate(experts.layers) if i in numberings}
    for name in model_names(source):
        layer, last = layer_of(name), name.rpartition(".")[2]
        numbers = None if layer is None else of_layer.get(layer)
        if numbers is None:
            edited.keep(source, name)
        elif is_experts(name):
            _add(edited, source, name, partial(numbers.applied, last))
        elif ".moe.router." in name and last in Router.by_expert:
            _add(edited, source, name, partial(_rows, numbers.experts_E))
        else:
            edited.keep(source, name)
    counts = [place.num_experts for place in experts.layers]
    order_LE = torch.arange(counts[0]).repeat(len(counts), 1)
    for index, numbers in numberings.items():
        order_LE[index] = numbers.experts_E
    add_fractions(edited, source, counts, order_LE)
    return edited


def _rows(order_E: Tensor, values_E: Tensor) -> Tensor:
    return values_E[order_E]


def _add(edited: EditedModel, source: GlobalTensors, name: str, change: Callable[[Tensor], Tensor]) -> None:
    stored = source.tensors[name]
    edited.add(name, stored.shape, stored.dtype, lambda: change(source.read(name)))


@dataclass(frozen=True)
class FittedGroup:
    """Layers that share one source, with the fits of w1 and b1, and of w2 and b2."""

    source: Source
    layers: Sequence[int]
    fits: tuple[WeightedFit, WeightedFit]


def shared_model(
    source: GlobalTensors, sources: Sequence[Source], groups: Sequence[FittedGroup], num_banks: int
) -> EditedModel:
    """Returns a renumbered MoE with fitted banks and sets in place of the experts of layers that share."""
    config = source_config(source)
    moe = replace(config.moe, num_expert_banks=num_banks, samoe_granularity="layer", samoe_normalization="none")
    edited = begin_edit(source, with_sharing(replace(config, moe=moe), sources))
    experts, places = LayerExperts(source), moe_layers(config)
    shares = {places[index].index for group in groups for index in group.layers}
    for name in model_names(source):
        if not (is_experts(name) and layer_of(name) in shares):
            edited.keep(source, name)
    for group in groups:
        _add_group(edited, experts, [places[index] for index in group.layers], group)
    add_fractions(edited, source, [place.num_experts for place in places])
    return edited


def _add_group(edited: EditedModel, experts: LayerExperts, places: Sequence[LayerPlace], group: FittedGroup) -> None:
    if group.source.way.mixes:
        for number, place in enumerate(places):
            a_2GP = torch.stack([fit.coefficients_LGP[number] for fit in group.fits]).float()
            edited.add_value(f"layers.{place.index}.moe.combination", a_2GP)
    for kind in experts.kinds:
        bank_PEUD = group.fits[ROW_OF_WEIGHT[kind]].bank_PEUD
        shape = experts.shape(places[0], kind)
        width = shape[-1]
        part = bank_PEUD[..., :width] if kind[0] == "w" else bank_PEUD[..., -1]
        # What is shared is its own master weight, fp32 in every precision.
        edited.add_value(group.source.stored(0) + kind, part.reshape(len(bank_PEUD), *shape).float())
