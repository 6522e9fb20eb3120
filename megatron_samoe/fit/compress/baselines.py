"""Baselines of compression at equal bytes: pruning by REAP's saliency, and merging within a layer.

Both leave each layer E' experts of its own. Merging is HC-SMoE's in outline (arXiv:2410.08589): average linkage of the experts'
mean outputs, then means weighted by how often an expert is chosen; here neurons are matched first, which it does not do. As
there, the router keeps its E scores, and a token's choices go to the experts that theirs were merged into; so the model that is
written has E experts, of which those of one cluster are equal, and its bytes are counted as E'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_samoe.config.validate import without_idle_options
from megatron_samoe.convert.edited_model import EditedModel, add_fractions, begin_edit, source_config
from megatron_samoe.convert.layer_experts import LayerExperts, stored_experts
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.fit.assignment import assigned
from megatron_samoe.fit.calibration import LayerCalibration
from megatron_samoe.fit.compress.compressible import expert_bytes
from megatron_samoe.fit.expert_math import hidden_of, output_of
from megatron_samoe.fit.matching import neuron_products
from megatron_samoe.fit.numbering import Numbering
from megatron_samoe.fit.shared_model import with_numberings
from megatron_samoe.ops.grouped_mlp import Activation, ExpertWeights


def experts_in_budget(source: GlobalTensors, num_bytes: int) -> int:
    """Returns E', the most experts per layer whose bytes fit; the same number of each group of experts.

    Raises:
        ConfigError: fewer than a token chooses, of all or of a group.
    """
    moe = source_config(source).moe
    assert isinstance(moe.num_experts, int)
    groups, chosen = moe.moe_router_num_groups or 1, moe.choices_of_group
    kept = moe.num_experts * num_bytes // expert_bytes(source) // groups
    if kept < chosen:
        where = "layer" if groups == 1 else "group"
        raise ConfigError(
            "--budget", f"{num_bytes:,} bytes", f"leaves {kept} experts a {where}; a token chooses {chosen}"
        )
    return int(kept * groups)


def pruned_model(source: GlobalTensors, calibrations: Sequence[LayerCalibration], num_kept: int) -> EditedModel:
    """Returns a MoE of each layer's most salient experts, in their order, with their rows of the router."""
    config = source_config(source)
    moe, groups = replace(config.moe, num_experts=num_kept), config.moe.moe_router_num_groups or 1
    kept = [_most_salient(calibration.mean_saliency_E, num_kept, groups) for calibration in calibrations]
    numberings = {index: Numbering.of_experts(kept_E, config.expert_ffn_size) for index, kept_E in enumerate(kept)}
    return with_numberings(source, without_idle_options(replace(config, moe=moe)), numberings)


def _most_salient(saliency_E: Tensor, num_kept: int, groups: int) -> Tensor:
    """Returns the experts to keep in their order, the same number of each of the consecutive groups."""
    kept_GE = saliency_E.view(groups, -1).topk(num_kept // groups, dim=1).indices.sort(1).values
    return (kept_GE + torch.arange(groups)[:, None] * (len(saliency_E) // groups)).flatten()


def merged_model(source: GlobalTensors, calibrations: Sequence[LayerCalibration], num_kept: int) -> EditedModel:
    """Returns a MoE in which the experts of a layer's cluster are all their mean; E' clusters are counted as E' experts."""
    experts = LayerExperts(source)
    edited = begin_edit(source, experts.config)
    for place, calibration in zip(experts.layers, calibrations, strict=True):
        for kind, merged in merge(experts.weights(place), calibration, num_kept, experts.activation).items():
            edited.add_value(stored_experts(place) + kind, merged.to(experts.dtype))
    add_fractions(edited, source, [place.num_experts for place in experts.layers])
    return edited


def merge(
    weights: ExpertWeights, calibration: LayerCalibration, num_kept: int, activation: Activation
) -> ExpertWeights:
    """Returns a layer's experts, each replaced by the mean of its cluster."""
    x_NH = torch.cat([calibration.samples(expert)[0] for expert in range(len(weights.w1))])
    cluster_E = clusters(output_of(weights, hidden_of(weights, x_NH, activation)).mean(1), num_kept)
    new = weights.map(Tensor.clone)
    for number in cluster_E.unique():
        members = (cluster_E == number).nonzero()[:, 0]
        if len(members) > 1:
            for kind, mean in _mean(weights, calibration, members, activation).items():
                getattr(new, kind)[members] = mean
    return new


def clusters(features_EH: Tensor, count: int) -> Tensor:
    """Returns the cluster of each expert, by average linkage of distances."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if count >= len(features_EH):
        return torch.arange(len(features_EH))
    tree = linkage(features_EH.double().numpy(), method="average")
    return torch.from_numpy(np.asarray(fcluster(tree, count, criterion="maxclust"))).long()


def _mean(
    weights: ExpertWeights, calibration: LayerCalibration, members: Tensor, activation: Activation
) -> dict[str, Tensor]:
    """Returns the mean of experts, weighted by their tokens, neurons matched to those of the one chosen most."""
    share_E = calibration.tokens_E[members].clamp_min(1)
    share_E = share_E / share_E.sum()
    first = int(members[share_E.argmax()])
    own_F = torch.arange(weights.w2.shape[2])
    total: dict[str, Tensor] = {}
    for expert, share in zip(members.tolist(), share_E.tolist(), strict=True):
        x_NH = torch.cat((calibration.samples(first)[0], calibration.samples(expert)[0]))
        order_F = (
            own_F
            if expert == first
            else assigned(neuron_products((weights, first), (weights, expert), own_F, x_NH, activation))
        )
        for kind, tensor in weights.items():
            one = tensor[expert]
            one = one if kind == "b2" else one.index_select({"w1": -2, "b1": -1, "w2": -1}[kind], order_F)
            total[kind] = total[kind] + share * one if kind in total else share * one
    return total
