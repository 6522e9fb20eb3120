"""A way of sharing: layers combine the banks of a pool, and each adds a low-rank part of its own to every expert's matrices.

    W[l, e] = sum_p A[l, p] T[p, e] + U[l, e] V[l, e]

U begins at 0, so that a layer begins as one of the pool (LoRA, arXiv:2106.09685). It trains; such experts are not decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from megatron_samoe.config.sharing_map import Way
from megatron_samoe.errors import ConfigError
from megatron_samoe.moe.sharing.coefficients import Coefficients
from megatron_samoe.moe.sharing.combined import CombinedSharing, StepLender
from megatron_samoe.moe.sharing.way import Mixture, SharingContext
from megatron_samoe.ops.grouped_mlp import ExpertWeights
from megatron_samoe.parallel_state.parameter_tag import ZEROS, Init, ParameterTag
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.tensor_parallel.layers import new_parameter

RANK = 5


class LowRankPart(Coefficients):
    """A layer's coefficients and, for w1 and w2, u [e, rows, r] and v [e, r, inputs], with SwiGLU's 2 after e."""

    def __init__(self, context: SharingContext, moe_index: int):
        shape, state = context.shapes[moe_index], context.state
        super().__init__(context.config, moe_index, len(context.shapes), shape.num_experts, state, context.dtype)

        def factor(init: Init, *sides: int, split: int | None = None) -> nn.Parameter:
            # F is split over etp; a factor without it gets a part of its gradient from each rank.
            splits = ((0, "ep"),) if split is None else ((0, "ep"), (split, "etp"))
            spec = ShardSpec("expert", splits, partial=("etp",) if split is None else ())
            tag = ParameterTag(spec, init, "step_end", is_routed_expert=True)
            return new_parameter((shape.num_experts, *sides), tag, state, torch.float32)

        H, F = shape.hidden_size, shape.ffn_size
        gates = (2,) if shape.activation == "swiglu" else ()
        self.u1 = factor(ZEROS, *gates, F, RANK, split=len(gates) + 1)
        self.v1 = factor(Init(std=H**-0.5, num_indexed_dims=1), *gates, RANK, H)
        self.u2 = factor(ZEROS, H, RANK)
        self.v2 = factor(Init(std=F**-0.5, num_indexed_dims=1), RANK, F, split=2)


class LowRankLender(StepLender):
    """Adds the layers' own parts to what they combine, and takes their gradients from those of the sums."""

    def begin_step(self) -> None:
        """Makes the layers' weights."""
        super().begin_step()
        for weight, u, v in self._parts(self._weights):
            weight += (u.detach() @ v.detach()).to(weight.dtype)

    def finish_step(self) -> None:
        """Contracts the layers' gradients, before they are cleared."""
        for grad, u, v in self._parts(self._grads):
            u.main_grad += grad @ v.detach().mT
            v.main_grad += u.detach().mT @ grad
        super().finish_step()

    def _parts(self, of: ExpertWeights | None) -> Iterator[tuple[Tensor, nn.Parameter, nn.Parameter]]:
        for moe_index, row in self._row_of_layer.items() if of is not None else ():
            part = self._coefficients[moe_index]
            yield from ((of.w1[row], part.u1, part.v1), (of.w2[row], part.u2, part.v2))


class LowRankSharing(CombinedSharing):
    """See `way.SharingWay`."""

    def layer_part(self, moe_index: int) -> LowRankPart:
        """Returns a layer's coefficients and factors."""
        return LowRankPart(self._context, moe_index)

    def lender(self, layer_parts: Mapping[int, nn.Module], shared_part: nn.Module | None) -> LowRankLender:
        """Returns the lender."""
        return LowRankLender(shared_part, layer_parts, self._context.state, self._context.dtype)

    def mixture(self, moe_index: int, layer_part: nn.Module, shared_part: nn.Module | None) -> Mixture:
        """Raises ConfigError."""
        raise ConfigError(
            "--expert-sharing", "low_rank", "trains and is not decoded: its experts are not mixtures of banks"
        )


LOW_RANK = Way("low_rank", mixes=True, make=LowRankSharing)
