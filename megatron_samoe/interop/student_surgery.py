"""A student of fewer layers, which starts from chosen layers of a teacher (Mixture-of-Students, arXiv:2201.05596)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_samoe.config.derived import written_layer_freq
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import Source
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError
from megatron_samoe.interop.edited_model import (
    FRACTIONS,
    POOL,
    SETS,
    EditedModel,
    begin_edit,
    model_names,
    one_number,
    source_config,
    with_sharing,
    without_idle_options,
)
from megatron_samoe.interop.layer_experts import LayerExperts, is_experts, source_of, stored_experts
from megatron_samoe.models.layer_layout import LayerPlace, all_layers


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
    new_index = {layer: i for i, layer in enumerate(layers)}
    experts, with_experts = LayerExperts(source), [place for place in kept if place.moe_index is not None]
    sources = _sources(with_experts)
    edited = begin_edit(source, _student_config(config, kept, sources))
    owners = dict(zip((place.index for place in with_experts), sources, strict=True))
    for name in model_names(source):
        _, _, rest = name.partition(".")
        number, _, ending = rest.partition(".")
        if name.startswith("layers."):
            if int(number) in new_index:
                edited.keep(source, name, f"layers.{new_index[int(number)]}.{ending}")
        elif not is_experts(name):
            edited.keep(source, name)
    for new_name, name, is_set in _shared(with_experts, owners, new_index, experts):
        stored = source.tensors[name]
        if is_set:
            edited.keep(source, name, new_name)
        else:
            edited.add(new_name, stored.shape[1:], experts.dtype, lambda n=name: source.read(n)[0])
    if FRACTIONS in source.tensors and with_experts:
        rows, most = [place.moe_index for place in with_experts], max(place.num_experts for place in with_experts)

        def fractions() -> Tensor:
            return source.read(FRACTIONS)[rows, :most]

        edited.add(FRACTIONS, (len(rows), most), torch.float32, fractions)
    edited.report.append(f"student: {len(layers)} of {count} layers, {', '.join(map(str, layers))}.")
    return edited


def _sources(places: Sequence[LayerPlace]) -> list[Source]:
    """Returns where the kept MoE layers' experts come from; a tied set that one of them uses becomes that layer's own."""
    users = Counter(source_of(place) for place in places)
    left = [s for s in users if s.way == "scaled" or (s.way == "tied" and users[s] > 1)]
    numbers = {source: i for i, source in enumerate(sorted(left, key=lambda s: s.number))}
    sources = []
    for place in places:
        source = source_of(place)
        is_alone = source.way == "tied" and source not in numbers
        sources.append(Source("own") if is_alone else Source(source.way, numbers.get(source, 0)))
    return sources


def _student_config(config: PretrainConfig, kept: Sequence[LayerPlace], sources: Sequence[Source]) -> PretrainConfig:
    is_moe = [place.moe_index is not None for place in kept]
    # The teacher's stages are no longer those of the model.
    config = replace(config, model=replace(config.model, num_layers=len(kept)), parallel=ParallelConfig())
    if not any(is_moe):
        return without_idle_options(replace(config, moe=MoEConfig()))
    counts = tuple(place.num_experts for place in kept if place.moe_index is not None)
    moe = replace(
        config.moe,
        moe_layer_freq=written_layer_freq(is_moe),
        num_experts=one_number(counts),
    )
    return with_sharing(replace(config, moe=moe), sources)


def _shared(
    places: Sequence[LayerPlace], owners: dict[int, Source], new_index: dict[int, int], experts: LayerExperts
) -> Iterator[tuple[str, str, bool]]:
    """Yields new and old name of each tensor of what is shared, and whether it stays so."""
    seen = set()
    for place in places:
        old, new = stored_experts(place), owners[place.index]
        if source_of(place).way == "own" or old in seen:
            continue
        seen.add(old)
        stays = new.way != "own"
        begin = POOL if new.way == "combined" else f"{SETS}{new.number}."
        for kind in experts.kinds:
            yield (begin if stays else f"layers.{new_index[place.index]}.moe.experts.") + kind, old + kind, stays
