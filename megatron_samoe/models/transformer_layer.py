"""One pre-norm transformer layer: attention, then a dense MLP or experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_samoe.errors import ConfigError
from megatron_samoe.models.attention import AttentionCore, AttentionInputs
from megatron_samoe.models.blueprint import Blueprint
from megatron_samoe.models.layer_layout import LayerSpec
from megatron_samoe.models.mlp import MLP
from megatron_samoe.models.norms import Norm
from megatron_samoe.moe.branch_scale import branch_scale, router_init_std
from megatron_samoe.moe.mixing import Mixing, SharedExpertGate
from megatron_samoe.moe.moe_layer import MoELayer
from megatron_samoe.moe.sharing.way import ExpertLender
from megatron_samoe.moe.types import ForwardContext, MoELayerSpec, MoEStats


class TransformerLayer(nn.Module):
    """A layer: x + attention(norm(x)), then x + mlp(norm(x)), or with --use-parallel-residual x + attention(norm(x)) +
    mlp(norm(x)). `mlp` is dense; `moe` replaces it in MoE layers.
    """

    attention: Any  # whatever the parts say

    def __init__(self, blueprint: Blueprint, spec: LayerSpec):
        super().__init__()
        model, state, dtype = blueprint.config.model, blueprint.state, blueprint.dtype
        self.index, self.dropout, self.state, self.dtype = spec.index, model.hidden_dropout, state, dtype
        self.is_parallel, self.multiplier = model.use_parallel_residual, model.residual_multiplier
        selective = blueprint.config.training.recompute_granularity == "selective"
        self.attention_norm = Norm(model, model.hidden_size, state, dtype)
        self.attention = blueprint.parts.attention(model, spec.index, state, dtype, recompute_core=selective)
        if state.cp.size > 1 and not isinstance(self.attention, AttentionCore):
            allowed = (
                "must be 1 with attention from outside that is not an AttentionCore, which sees the keys of other ranks"
            )
            raise ConfigError("--context-parallel-size", state.cp.size, allowed)
        self.mlp_norm = Norm(model, model.hidden_size, state, dtype)
        if spec.moe_index is None:
            self.mlp = MLP(model, model.mlp_size, model.init_method_std, model.output_init_std, state, dtype)
        else:
            self.moe = _moe_layer(blueprint, spec, spec.moe_index)

    @property
    def is_moe(self) -> bool:
        """Whether the layer has routed experts."""
        return hasattr(self, "moe")

    def forward(
        self,
        x_TH: Tensor,
        inputs: AttentionInputs,
        context: ForwardContext,
        lender: ExpertLender,
        loads_BC: Tensor | None = None,
    ) -> tuple[Tensor, MoEStats | None, Tensor | None]:
        """Returns the next residual stream, the statistics of an MoE layer, and the loads of shared sets where these
        are balanced over layers.
        """
        y_TH = self.attention(self.attention_norm(x_TH), inputs, context)
        normed_TH = self.mlp_norm(x_TH) if self.is_parallel else None
        x_TH = torch.add(x_TH, self._dropout(y_TH, context, "attention_output"), alpha=self.multiplier)
        normed_TH = self.mlp_norm(x_TH) if normed_TH is None else normed_TH
        stats = None
        if self.is_moe:
            y_TH, stats, loads_BC = self.moe(normed_TH, context, lender, loads_BC)
        else:
            y_TH = self.mlp(normed_TH)
        x_TH = torch.add(x_TH, self._dropout(y_TH, context, "mlp_output"), alpha=self.multiplier)
        return x_TH, stats, loads_BC

    def _dropout(self, y_TH: Tensor, context: ForwardContext, site: str) -> Tensor:
        if not context.training or self.dropout == 0.0:
            return y_TH
        assert context.random is not None
        return context.random.dropout(y_TH, self.dropout, self.index, site, self.state.token_share)


def _moe_layer(blueprint: Blueprint, spec: LayerSpec, moe_index: int) -> MoELayer:
    config, state, dtype, parts = blueprint.config, blueprint.state, blueprint.dtype, blueprint.parts
    moe, model = config.moe, config.model
    loads = blueprint.set_loads
    columns = None if loads is None else loads.columns[moe_index]
    moe_spec = MoELayerSpec(spec.index, moe_index, blueprint.expert_shapes[moe_index], router_init_std(config), columns)
    # A layer whose set is balanced over all its layers has no balance loss of its own.
    balanced = moe if columns is None else replace(moe, moe_router_load_balancing_type="none")
    router = parts.router(moe, moe_spec, parts.balance(balanced, state.dp), state, dtype)
    shared = mixing = None
    if config.shared_expert_size is not None:
        stds = (model.init_method_std, model.output_init_std * branch_scale(config, spec.num_experts).shared)
        shared = MLP(model, config.shared_expert_size, *stds, state, dtype)
    if moe.moe_residual_mlp or moe.moe_shared_expert_gate:
        kind = Mixing if moe.moe_residual_mlp else SharedExpertGate
        mixing = kind(model.hidden_size, model.init_method_std, state, dtype)
    return MoELayer(
        moe_spec,
        router,
        blueprint.sharing.layer_part(moe_index),
        shared,
        state,
        config.parallel.moe_dispatch_chunks,
        config.parallel.moe_shared_expert_overlap,
        mixing,
    )
