"""Which layers are MoE, and which layers a rank holds: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import parse_moe_layer_freq


@dataclass(frozen=True)
class LayerPlace:
    """One transformer layer.

    Attributes:
        index: among all layers.
        moe_index: among MoE layers, or None for a layer with a dense MLP.
    """

    index: int
    moe_index: int | None


def all_layers(config: PretrainConfig) -> tuple[LayerPlace, ...]:
    """Returns the layers of the whole model in order."""
    num_layers = config.model.num_layers
    if config.moe.expert_layout == "dense":
        return tuple(LayerPlace(i, None) for i in range(num_layers))
    places, moe_index = [], 0
    for i, is_moe in enumerate(parse_moe_layer_freq(config.moe.moe_layer_freq, num_layers)):
        places.append(LayerPlace(i, moe_index if is_moe else None))
        moe_index += is_moe
    return tuple(places)
