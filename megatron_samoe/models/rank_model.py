"""Everything of the model that one rank holds: its stages and, if experts are shared, its part of the pool."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_samoe.config.derived import num_moe_layers
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.models.gpt_stage import GPTStage
from megatron_samoe.models.initialize import initialize_parameters
from megatron_samoe.models.layer_layout import moe_layers_of, rank_plans
from megatron_samoe.models.transformer_layer import TransformerLayer, expert_shape, output_init_std
from megatron_samoe.moe.branch_scale import branch_scale
from megatron_samoe.moe.expert_pool import ExpertPool, LayerCombination, StepCombination, make_combination
from megatron_samoe.moe.types import ForwardContext, MoEStats
from megatron_samoe.parallel_state.state import ParallelState


class RankModel(nn.Module):
    """The rank's chunks (one, or several with virtual pipeline stages) and the one pool that it lends to them."""

    def __init__(self, config: PretrainConfig, vocab_size: int, state: ParallelState, dtype: torch.dtype):
        super().__init__()
        self.config, self.state, self.vocab_size, self.dtype = config, state, vocab_size, dtype
        self.num_moe_layers = num_moe_layers(config)
        self.chunks = nn.ModuleList(
            GPTStage(config, plan, self.num_moe_layers, vocab_size, state, dtype)
            for plan in rank_plans(config, state.pp.rank)
        )
        self.expert_pool: ExpertPool | None = None
        self.combination: StepCombination | LayerCombination | None = None
        if config.moe.has_pool:
            stds = (config.model.init_method_std, output_init_std(config) * branch_scale(config).routed)
            self.expert_pool = ExpertPool(config.moe, expert_shape(config), *stds, state, dtype)
            self.combination = self._combination(config.moe)

    def combine_per(self, when: Literal["step", "layer"]) -> None:
        """Combines the pool's banks from now on once per step or layer by layer, whatever was configured."""
        if self.combination is not None:
            self.combination = self._combination(replace(self.config.moe, samoe_combine=when))

    def _combination(self, moe: MoEConfig) -> StepCombination | LayerCombination:
        assert self.expert_pool is not None
        coefficients = {layer.moe.moe_index: layer.moe.combination for layer in self.moe_layers()}
        layers_of_stage = tuple(moe_layers_of(self.config, stage) for stage in range(self.state.pp.size))
        return make_combination(moe, self.expert_pool, coefficients, self.state, self.dtype, layers_of_stage)

    def moe_layers(self) -> list[TransformerLayer]:
        """Returns this rank's MoE layers in order."""
        return [layer for chunk in self.chunks for layer in chunk.layers.values() if layer.is_moe]

    def global_parameters(self) -> dict[str, nn.Parameter]:
        """Returns parameters under names that are the same in every layout."""
        return {re.sub(r"^chunks\.\d+\.", "", name): p for name, p in self.named_parameters()}

    def begin_step(self) -> None:
        """Makes the pool's current weights take effect; to be called after they change and before a forward pass."""
        if self.combination is not None:
            self.combination.begin_step()

    def finish_step(self) -> None:
        """Completes this rank's gradients of the pool, before they are reduced."""
        if self.combination is not None:
            self.combination.finish_step()

    def forward(
        self, x: Tensor, context: ForwardContext, positions_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None, chunk: int = 0,
    ) -> tuple[Tensor, list[MoEStats]]:  # fmt: skip
        """Returns what a chunk makes of its input, and the statistics of its MoE layers: see `GPTStage.forward`."""
        return self.chunks[chunk](x, context, self.combination, positions_BS, document_ids_BS)

    def loss(self, logits_TV: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns loss_T, on the last stage."""
        return self.chunks[-1].loss(logits_TV, labels_BS)


def compute_dtype(config: PretrainConfig) -> torch.dtype:
    """Returns the dtype of weights and activations."""
    return torch.bfloat16 if config.training.bf16 else torch.float16 if config.training.fp16 else torch.float32


def build_model(
    config: PretrainConfig, vocab_size: int, state: ParallelState, dtype: torch.dtype | None = None
) -> RankModel:
    """Returns this rank's model with initial weights.

    Args:
        vocab_size: tokens that exist, before padding.
        dtype: of weights and activations; the configured precision if not given.
    """
    model = RankModel(config, vocab_size, state, dtype or compute_dtype(config))
    initialize_parameters(model.global_parameters(), state, config.training.seed)
    return model
