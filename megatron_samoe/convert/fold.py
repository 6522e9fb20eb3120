"""A model that shares experts folded into a plain MoE, which needs no combining.

Every layer's experts are computed once, as a step of training does. What is shared is given up: the result is as large as the
standard MoE that it equals.
"""

from __future__ import annotations

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import OWN, ExpertSource
from megatron_samoe.convert.edited_model import EditedModel, require, source_config, with_sharing
from megatron_samoe.convert.layer_experts import LayerExperts, source_of, stored_experts
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors


def fold_shared(source: GlobalTensors) -> EditedModel:
    """Returns the plain MoE that computes what a model with shared experts computes, in the model's precision.

    Raises:
        ConfigError: no layers of the source share experts.
    """
    config = source_config(source)
    require(config.moe.shares_experts, config, "experts that layers share", "fold")
    experts = LayerExperts(source)
    own = [ExpertSource(OWN)] * len(experts.layers)
    edited = experts.reshared(with_sharing(config, own), own, lambda place, kind: experts.read(place, kind)[None])
    edited.report.append(_folded(config, experts))
    return edited


def _folded(config: PretrainConfig, experts: LayerExperts) -> str:
    stored = {stored_experts(place): source_of(place) for place in experts.layers}
    ways = [source.way for source in stored.values()]
    banks = config.moe.num_expert_banks if any(way.combines for way in ways) else 0
    counts = {
        "banks": banks,
        "sets": sum(way.in_sets for way in ways),
        "layers of their own": sum(not way.is_shared for way in ways),
    }
    held, layers = " and ".join(f"{n} {what}" for what, n in counts.items() if n), len(experts.layers)
    size = {place: place.num_experts for place in experts.layers}
    parts = {stored_experts(p): n * (banks if source_of(p).way.combines else 1) for p, n in size.items()}
    each = " or ".join(map(str, sorted(set(size.values()))))
    ratio = sum(size.values()) / sum(parts.values())
    return f"fold: {held} into {layers} layers of {each} experts each, {ratio:.1f} times the expert parameters."
