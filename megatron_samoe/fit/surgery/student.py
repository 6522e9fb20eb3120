"""A student of fewer layers, which starts from chosen layers of a teacher (Mixture-of-Students, arXiv:2201.05596)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_samoe.config.derived import written_layer_freq
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import ExpertSource, renumbered
from megatron_samoe.config.validate import without_idle_options
from megatron_samoe.convert.edited_model import (
    FRACTIONS,
    EditedModel,
    begin_edit,
    model_names,
    source_config,
    with_sharing,
)
from megatron_samoe.convert.layer_experts import LayerExperts, is_experts, layer_of, source_of
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.layer_layout import LayerSpec, all_layers


def keep_layers(source: GlobalTensors, layers: Sequence[int]) -> EditedModel:
    """Returns the model of some of a model's layers, numbered anew; what no layer uses any more is left out.

    Args:
        layers: rising, from 0.

    Raises:
        ConfigError: a layer is not there, or given twice or out of order; or banks outnumber the layers that combine them.
    """
    config = source_config(source)
    count = config.model.num_layers
    if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < count:
        raise ConfigError(
            "--keep-layers", ",".join(map(str, layers)), f"must be rising numbers of layers from 0 to {count - 1}"
        )
    kept = [all_layers(config)[layer] for layer in layers]
    experts, sparse = LayerExperts(source), [place for place in kept if place.moe_index is not None]
    sources = renumbered([source_of(place) for place in sparse])
    new = _student_config(config, kept, sources)
    edited = begin_edit(source, new, lambda name: layer_of(name) is None and not is_experts(name))
    for name in model_names(source):
        layer = layer_of(name)
        if layer in layers and not name.startswith(f"layers.{layer}.moe.experts."):
            edited.keep(source, name, name.replace(f"layers.{layer}.", f"layers.{layers.index(layer)}.", 1))
    indices = [layers.index(place.index) for place in sparse]
    experts.add_to(edited, list(zip(sparse, sources, indices, strict=True)))
    if FRACTIONS in source.tensors and sparse:
        rows, most = [place.moe_index for place in sparse], max(place.num_experts for place in sparse)
        edited.add(FRACTIONS, (len(rows), most), torch.float32, lambda: source.read(FRACTIONS)[rows, :most])
    edited.report.append(f"student: {len(layers)} of {count} layers, {', '.join(map(str, layers))}.")
    return edited


def _student_config(
    config: PretrainConfig, kept: Sequence[LayerSpec], sources: Sequence[ExpertSource]
) -> PretrainConfig:
    is_moe = [place.moe_index is not None for place in kept]
    # The teacher's stages are no longer those of the model.
    config = replace(config, model=replace(config.model, num_layers=len(kept)), parallel=ParallelConfig())
    if not any(is_moe):
        return without_idle_options(replace(config, moe=MoEConfig()))
    counts = tuple(place.num_experts for place in kept if place.moe_index is not None)
    moe = replace(config.moe, moe_layer_freq=written_layer_freq(is_moe), num_experts=counts)
    return with_sharing(replace(config, moe=moe), sources)
