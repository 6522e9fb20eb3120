"""One pre-norm transformer layer: attention, then a dense MLP or experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.models.attention import AttentionInputs, SelfAttention
from megatron_samoe.models.layer_layout import LayerPlace
from megatron_samoe.models.mlp import MLP, activation_of
from megatron_samoe.models.norms import Norm
from megatron_samoe.moe.branch_scale import branch_scale, router_init_std
from megatron_samoe.moe.expert_pool import Combination
from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.moe.moe_layer import MoELayer
from megatron_samoe.moe.types import ForwardContext, MoEStats
from megatron_samoe.parallel_state.state import ParallelState


def expert_shape(config: PretrainConfig) -> ExpertShape:
    """Returns the global sizes of one layer's routed experts."""
    model, moe = config.model, config.moe
    return ExpertShape(
        moe.num_experts, model.hidden_size, config.expert_ffn_size, activation_of(model),
        bias=not model.disable_bias_linear,
    )  # fmt: skip


def output_init_std(config: PretrainConfig) -> float:
    """Returns the spread of projections that end on the residual stream (GPT-2: smaller by the root of their number)."""
    return config.model.init_method_std / (2 * config.model.num_layers) ** 0.5


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). `mlp` is dense; `moe` takes its place in MoE layers."""

    def __init__(self, config: PretrainConfig, place: LayerPlace, num_moe_layers: int, state: ParallelState,
                 dtype: torch.dtype):  # fmt: skip
        super().__init__()
        model, stds = config.model, (config.model.init_method_std, output_init_std(config))
        self.index, self.dropout, self.state = place.index, model.hidden_dropout, state
        selective = config.training.recompute_granularity == "selective"
        self.attention_norm = Norm(model, model.hidden_size, state, dtype)
        self.attention = SelfAttention(model, place.index, state, dtype, recompute_core=selective)
        self.mlp_norm = Norm(model, model.hidden_size, state, dtype)
        if place.moe_index is None:
            self.mlp = MLP(model, model.mlp_size, *stds, state, dtype)
            return
        shared_size = config.moe.moe_shared_expert_intermediate_size
        scale = branch_scale(config)
        shared_stds = (stds[0], stds[1] * scale.shared)
        shared = None if shared_size is None else MLP(model, shared_size, *shared_stds, state, dtype)
        self.moe = MoELayer(
            config.moe, expert_shape(config), init_std=stds[0], output_init_std=stds[1] * scale.routed,
            router_init_std=router_init_std(config), layer=place.index, moe_index=place.moe_index,
            num_moe_layers=num_moe_layers, shared_expert=shared, state=state, dtype=dtype,
            dispatch_chunks=config.parallel.moe_dispatch_chunks,
            overlap_shared_expert=config.parallel.moe_shared_expert_overlap,
        )  # fmt: skip

    @property
    def is_moe(self) -> bool:
        """Whether the layer has routed experts."""
        return hasattr(self, "moe")

    def forward(
        self, x_TH: Tensor, inputs: AttentionInputs, context: ForwardContext, pool: Combination | None
    ) -> tuple[Tensor, MoEStats | None]:
        """Returns the next residual stream and, from an MoE layer, its statistics."""
        y_TH = self.attention(self.attention_norm(x_TH), inputs, context)
        x_TH = x_TH + self._dropout(y_TH, context, "attention_output")
        normed_TH = self.mlp_norm(x_TH)
        stats = None
        if self.is_moe:
            y_TH, stats = self.moe(normed_TH, context, pool)
        else:
            y_TH = self.mlp(normed_TH)
        return x_TH + self._dropout(y_TH, context, "mlp_output"), stats

    def _dropout(self, y_TH: Tensor, context: ForwardContext, site: str) -> Tensor:
        if not context.training or self.dropout == 0.0:
            return y_TH
        assert context.random is not None
        part, parts = (self.state.tp.rank, self.state.tp.size) if self.state.sequence_parallel else (0, 1)
        return context.random.dropout(y_TH, self.dropout, self.index, site, part, parts)
