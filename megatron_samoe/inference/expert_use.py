"""Which experts each token of a text uses, and where a layer's experts come from."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.router import Routing
from megatron_samoe.moe.types import ForwardContext


@dataclass(frozen=True)
class LayerUse:
    """The experts of one MoE layer that the tokens of a text use.

    Attributes:
        layer: of the model, from 0.
        num_experts: that its router chooses from.
        source: where its experts come from, as `--expert-sharing` names it, with the number of a shared set.
        banks: weight of each bank in the layer's experts, the mean over both projections and over experts; empty unless they
            are combined.
        experts_TK: each token's experts; -1 where a choice was dropped.
        weights_TK: their weights.
    """

    layer: int
    num_experts: int
    source: str
    banks: list[float]
    experts_TK: list[list[int]]
    weights_TK: list[list[float]]


@torch.no_grad()
def expert_use(model: RankModel, ids: Sequence[int]) -> list[LayerUse]:
    """Returns what a text's tokens use of each MoE layer, by the model's own forward pass.

    Raises:
        ConfigError: the model is split over ranks, or the text is empty or longer than the context.
    """
    if model.state.world.size > 1:
        raise ConfigError("ranks", model.state.world.size, "must be 1 to show which experts are used")
    most = model.config.model.max_positions
    if not 0 < len(ids) <= most:
        raise ConfigError("the text", f"{len(ids)} tokens", f"must have 1 to {most} tokens")
    layers = model.moe_layers()
    chosen: dict[int, Routing] = {}
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(layers):

            def keep(_module: Any, _inputs: Any, routing: Routing, index: int = index) -> None:
                chosen[index] = routing

            hooks.callback(layer.moe.router.register_forward_hook(keep).remove)
        ids_1S = torch.tensor([ids], dtype=torch.int64, device=model.state.device)
        model(ids_1S, ForwardContext(batch_size=1, training=False))
    found = []
    for index, layer in enumerate(layers):
        source = model.sources[layer.moe.moe_index]
        a_2GP = model.mixture(layer.moe).a_2GP
        banks = [] if a_2GP is None else a_2GP.float().mean((0, 1)).tolist()
        routing = chosen[index]
        weights_TK = [[round(w, 4) for w in token] for token in routing.probs_TK.float().tolist()]
        found.append(
            LayerUse(layer.index, layer.moe.shape.num_experts, str(source), banks, routing.ids_TK.tolist(), weights_TK)
        )
    return found
