"""Every MoE layer owns its experts (GShard, arXiv:2006.16668; Switch, arXiv:2101.03961)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_samoe.moe.experts import ExpertShape, main_grads_of, weights_of, without_repeated_bias
from megatron_samoe.moe.sharing.way import ExpertLender, Mixture, SharingContext
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.grouped_mlp import Counts, ExpertWeights, grouped_mlp
from megatron_samoe.parallel_state.state import ParallelState


class OwnExperts(nn.Module):
    """The experts of a standard MoE layer: parameters of that layer only.

    Attributes:
        uses_main_grads: whether gradients are added to main gradients at once; else autograd hands them on.
    """

    is_sharded = False
    uses_main_grads = True

    def __init__(self, shape: ExpertShape, state: ParallelState, dtype: torch.dtype):
        super().__init__()
        for name, parameter in shape.parameters(None, state, dtype).items():
            self.register_parameter(name, parameter)
        self.activation, self.state = shape.activation, state

    def forward(self, x_RH: Tensor, rows_per_expert: Counts) -> Tensor:
        """Returns y_RH; see `types.Experts`."""
        parameters = dict(self.named_parameters())
        weights = without_repeated_bias(weights_of(parameters), self.state)
        grads = main_grads_of(parameters) if self.uses_main_grads else None
        if grads is not None:
            grads = without_repeated_bias(grads, self.state)
        return grouped_mlp(x_RH, rows_per_expert, weights, self.activation, grads)

    def unsharded(self) -> ExpertWeights:
        """Returns the experts as one bank, [1, e, ...]."""
        return weights_of(dict(self.named_parameters())).map(lambda t: t.detach()[None])

    @property
    def bank_numel(self) -> int:
        """Elements of the experts, all tensors together."""
        return sum(p.numel() for p in self.parameters())


class OwnSharing:
    """See `way.SharingWay`."""

    def __init__(self, context: SharingContext):
        self._context = context

    def layer_part(self, moe_index: int) -> nn.Module:
        """Returns a layer's experts."""
        context = self._context
        return OwnExperts(context.shapes[moe_index], context.state, context.dtype)

    def shared_part(self) -> None:
        """Returns nothing."""

    def lender(self, layer_parts: Mapping[int, nn.Module], shared_part: nn.Module | None) -> OwnLender:
        """Returns a lender of what each layer owns."""
        return OwnLender(layer_parts)

    def mixture(self, moe_index: int, layer_part: nn.Module, shared_part: nn.Module | None) -> Mixture:
        """Returns the layer's experts as they are."""
        assert isinstance(layer_part, OwnExperts)
        return Mixture(layer_part)


class OwnLender(ExpertLender):
    """See `way.ExpertLender`; nothing changes within a step."""

    def __init__(self, layer_parts: Mapping[int, nn.Module]):
        self._layer_parts = layer_parts

    def begin_step(self) -> None:
        """Weights take effect by themselves."""

    def experts(self, moe_index: int) -> Experts:
        """Returns a layer's own experts."""
        return self._layer_parts[moe_index]

    def finish_step(self) -> None:
        """Autograd has completed the gradients."""

    def layer_gradients(self) -> dict[int, ExpertWeights]:
        """Returns the main gradients."""
        found = {i: main_grads_of(dict(part.named_parameters())) for i, part in self._layer_parts.items()}
        return {i: grads for i, grads in found.items() if grads is not None}
