"""One MoE layer: route, dispatch, compute, combine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.moe.balance import attach_loss
from megatron_samoe.moe.mixing import Mixing, SharedExpertGate
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.sharing.way import ExpertLender
from megatron_samoe.moe.types import ForwardContext, MoELayerSpec, MoEStats
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.mappings import (
    copy_to_tensor_parallel_region,
    enter_tensor_parallel_region,
    gather_tokens,
    leave_tensor_parallel_region,
    scatter_tokens,
)


class MoELayer(nn.Module):
    """Routed experts, lent by whoever keeps them, and an optional shared expert.

    Args:
        router: decides for all tokens.
        experts: what the layer itself owns of its experts; see `sharing.way`.
        shared_expert: maps x_TH to y_TH for every token.
        dispatch_chunks: parts in which tokens travel to experts and back, one behind the experts of another.
        overlap_shared_expert: compute the shared expert while tokens travel.
        mixing: weighs the shared expert, maybe against routed ones; their sum if not given.
    """

    def __init__(
        self,
        spec: MoELayerSpec,
        router: Router,
        experts: nn.Module,
        shared_expert: Callable[[Tensor], Tensor] | None,
        state: ParallelState,
        dispatch_chunks: int = 1,
        overlap_shared_expert: bool = False,
        mixing: Mixing | SharedExpertGate | None = None,
    ):
        super().__init__()
        self.moe_index, self.shape, self.state = spec.moe_index, spec.shape, state
        self.router = router
        visited, width = router.kept_choices
        parts = dispatch_chunks if dispatch_chunks > 1 or overlap_shared_expert else None
        assert state.ep.size > 1 or parts is None
        self.dispatcher = AllToAllDispatcher(spec.shape.num_experts, state.ep, parts, visited < width)
        self.shared_expert, self.mixing = shared_expert, mixing
        self.experts = experts

    def forward(
        self, x_TH: Tensor, context: ForwardContext, lender: ExpertLender, loads_BC: Tensor | None = None
    ) -> tuple[Tensor, MoEStats, Tensor | None]:
        """Returns y_TH, the layer's statistics, and the loads of shared sets with its own; see `Router.forward`."""
        experts = lender.experts(self.moe_index)
        routing = self.router(x_TH, context, loads_BC)
        probs_TK = routing.probs_TK
        if routing.auxiliary_loss is not None:
            probs_TK = attach_loss(probs_TK, routing.auxiliary_loss, context.gradient_scale)
        rows_TH, ids_TK, probs_TK = self._enter(x_TH, routing.ids_TK, probs_TK)
        trip = self.dispatcher.dispatch(rows_TH, ids_TK)
        shared_TH = None if self.shared_expert is None else self.shared_expert(x_TH)  # while tokens travel
        y_TH = self._leave(trip.through(experts, probs_TK))
        if shared_TH is not None:
            y_TH = y_TH + shared_TH if self.mixing is None else self.mixing(x_TH, y_TH, shared_TH)
        return y_TH, routing.stats, routing.loads_BC

    def _enter(self, x_TH: Tensor, ids_TK: Tensor, probs_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From what tensor-parallel ranks hold to what this one's experts need. Routing is known for all tokens.

        Experts split over the same ranks see every token and give parts of a sum; unsplit experts see a share of tokens,
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
