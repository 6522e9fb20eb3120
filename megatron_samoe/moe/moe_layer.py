"""One MoE layer: route, dispatch, compute, combine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.moe.combination import coefficient_init, coefficient_spec
from megatron_samoe.moe.expert_pool import Combination
from megatron_samoe.moe.experts import ExpertShape, OwnExperts
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.routing_losses import attach_loss
from megatron_samoe.moe.types import ForwardContext, MoEStats
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import new_parameter
from megatron_samoe.tensor_parallel.mappings import (
    copy_to_tensor_parallel_region,
    enter_tensor_parallel_region,
    gather_tokens,
    leave_tensor_parallel_region,
    scatter_tokens,
)


class MoELayer(nn.Module):
    """Routed experts, own or borrowed from the pool, and an optional shared expert.

    Args:
        shape: global sizes of the routed experts.
        layer, moe_index, num_moe_layers: place among all layers, among MoE layers, and the number of those.
        shared_expert: maps x_TH to y_TH for every token.
        dispatch_chunks: parts in which tokens travel to experts and back, one behind the experts of another.
        overlap_shared_expert: compute the shared expert while tokens travel.
    """

    def __init__(
        self, config: MoEConfig, shape: ExpertShape, *, init_std: float, output_init_std: float, router_init_std: float,
        layer: int, moe_index: int, num_moe_layers: int, shared_expert: nn.Module | None, state: ParallelState, dtype: torch.dtype,
        dispatch_chunks: int = 1, overlap_shared_expert: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.moe_index = moe_index
        self.state = state
        self.router = Router(config, shape.hidden_size, router_init_std, layer, moe_index, state, dtype)
        self.dispatcher = AllToAllDispatcher(config.num_experts, state.ep, dispatch_chunks)
        self.overlaps = dispatch_chunks > 1 or overlap_shared_expert
        assert state.ep.size > 1 or not self.overlaps
        self.shared_expert = shared_expert
        if config.has_pool:
            groups = config.num_experts if config.samoe_granularity == "expert" else 1
            self.combination = new_parameter(
                (2, groups, config.num_expert_banks),
                coefficient_spec(config),
                coefficient_init(config, moe_index, num_moe_layers),
                state,
                torch.promote_types(dtype, torch.float32),
            )
            self.combination.requires_grad_(not config.samoe_freeze_coefficients)
        else:
            self.experts = OwnExperts(shape, init_std, output_init_std, state, dtype)

    def forward(self, x_TH: Tensor, context: ForwardContext, pool: Combination | None) -> tuple[Tensor, MoEStats]:
        """Returns y_TH and the layer's statistics; `pool` lends the experts where the layer owns none."""
        experts = self.experts if pool is None else pool.experts(self.moe_index)
        routing = self.router(x_TH, context)
        probs_TK = routing.probs_TK
        if routing.auxiliary_loss is not None:
            probs_TK = attach_loss(probs_TK, routing.auxiliary_loss, context.gradient_scale)
        rows_TH, ids_TK, probs_TK = self._enter(x_TH, routing.ids_TK, probs_TK)
        if self.overlaps:
            dispatching = self.dispatcher.start(rows_TH, ids_TK)
            shared_TH = self._shared(x_TH)
            for part, rows_per_expert in enumerate(dispatching.rows_per_expert):
                dispatching.send_back(part, experts(dispatching.arrive(part), rows_per_expert))
            y_TH = self._leave(dispatching.combine(probs_TK))
        else:
            dispatched = self.dispatcher.dispatch(rows_TH, ids_TK)
            y_RH = experts(dispatched.rows_RH, dispatched.rows_per_expert)
            y_TH = self._leave(self.dispatcher.combine(y_RH, probs_TK, dispatched))
            shared_TH = self._shared(x_TH)
        return y_TH if shared_TH is None else y_TH + shared_TH, routing.stats

    def _shared(self, x_TH: Tensor) -> Tensor | None:
        return None if self.shared_expert is None else self.shared_expert(x_TH)

    def _enter(self, x_TH: Tensor, ids_TK: Tensor, probs_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From what tensor-parallel ranks hold to what this one's experts need. Routing is known for all tokens.

        Experts split over the same ranks see every token and give parts of a sum; whole experts see a share of tokens,
        which with sequence parallelism is the share that x already is.
        """
        state, tp = self.state, self.state.tp
        if tp.size == 1:
            return x_TH, ids_TK, probs_TK
        if state.etp.size == tp.size:
            return enter_tensor_parallel_region(x_TH, state), ids_TK, copy_to_tensor_parallel_region(probs_TK, tp)
        ids_TK = ids_TK.chunk(tp.size)[tp.rank]
        if state.sequence_parallel:
            # Other rows' gradients arise on other ranks, and the router's logits are gathered, each rank its own.
            return x_TH, ids_TK, probs_TK.chunk(tp.size)[tp.rank]
        return scatter_tokens(x_TH, tp), ids_TK, scatter_tokens(probs_TK, tp)

    def _leave(self, y_TH: Tensor) -> Tensor:
        if self.state.etp.size == self.state.tp.size:
            return leave_tensor_parallel_region(y_TH, self.state)
        return y_TH if self.state.sequence_parallel else gather_tokens(y_TH, self.state.tp)
