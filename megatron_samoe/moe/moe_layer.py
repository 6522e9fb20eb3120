"""One MoE layer: route, dispatch, compute, combine."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.moe.balance import attach_loss
from megatron_samoe.moe.mixing import Mixing, SharedExpertGate
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.sharing.way import ExpertLender
from megatron_samoe.moe.types import ForwardContext, MoEPlace, MoEStats
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.mappings import (
    copy_to_tensor_parallel_region,
    enter_tensor_parallel_region,
    gather_tokens,
    leave_tensor_parallel_region,
    scatter_tokens,
)


class SharedExpert(Protocol):
    """An MLP that every token passes, and what it costs."""

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Returns y_TH."""
        ...

    def flops_per_token(self) -> float:
        """Returns multiply-adds x 2 of the forward pass."""
        ...

    def inner_bytes(self, tokens: int) -> int:
        """Returns the bytes that autograd keeps besides the input."""
        ...

    def kept_bytes(self, tokens: int) -> int:
        """Returns the same with the input."""
        ...


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
        place: MoEPlace,
        router: Router,
        experts: nn.Module,
        shared_expert: SharedExpert | None,
        state: ParallelState,
        dispatch_chunks: int = 1,
        overlap_shared_expert: bool = False,
        mixing: Mixing | SharedExpertGate | None = None,
    ):
        super().__init__()
        self.moe_index, self.shape, self.state = place.moe_index, place.shape, state
        self.router = router
        visited, width = router.kept_choices
        parts = dispatch_chunks if dispatch_chunks > 1 or overlap_shared_expert else None
        assert state.ep.size > 1 or parts is None
        self.dispatcher = AllToAllDispatcher(place.shape.num_experts, state.ep, parts, visited < width)
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

    def flops_per_token(self) -> float:
        """Returns multiply-adds x 2 of the forward pass, over all ranks that a token meets."""
        shared = 0.0 if self.shared_expert is None else self.shared_expert.flops_per_token()
        shared += 0.0 if self.mixing is None else self.mixing.flops_per_token()
        routed = self.router.experts_per_token * self.shape.matrix_elements
        return 2.0 * (self.router.weight.numel() + routed) + shared

    def kept_bytes(self, tokens: int, element_bytes: int) -> int:
        """Returns the bytes that autograd keeps of a micro-batch, with experts evenly loaded.

        Permuting keeps no input. The router keeps its own in fp32, a shared expert the gathered one; experts keep their
        first product and recompute activations.
        """
        state, shape, tp = self.state, self.shape, self.state.tp.size
        local_tokens = tokens // tp if state.sequence_parallel else tokens
        routed_tokens = tokens if state.etp.size == tp else tokens // tp
        visited, width = self.router.kept_choices
        rows = int(routed_tokens * visited)
        up = (2 if shape.activation == "swiglu" else 1) * shape.ffn_size // state.etp.size
        inner = rows * (up + 2 * shape.hidden_size) * element_bytes
        # Whole sequences are routed on each of their ranks.
        routed_here = tokens * state.cp.size
        router = 4 * (int(routed_here * (2 * shape.num_experts + width)) + local_tokens * shape.hidden_size)
        indices = 8 * (int(routed_tokens * (2 * width + 1)) + 2 * rows)
        total = inner + router + indices
        if self.shared_expert is not None:
            kept_by_router = element_bytes == 4 and local_tokens == tokens
            shared = self.shared_expert
            total += shared.inner_bytes(tokens) if kept_by_router else shared.kept_bytes(tokens)
        if self.mixing is not None:
            total += self.mixing.kept_bytes(local_tokens, element_bytes)
        return total
