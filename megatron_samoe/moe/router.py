"""The router: which experts each token visits, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.moe.capacity import drop_over_capacity, expert_capacity
from megatron_samoe.moe.routing_losses import auxiliary_loss, balance_sum
from megatron_samoe.moe.types import ForwardContext, MoEStats
from megatron_samoe.ops.topk_gate import topk_gate
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import Init, new_parameter, token_wise_spec
from megatron_samoe.tensor_parallel.mappings import gather_tokens


@dataclass(frozen=True)
class Routing:
    """The router's decision for one micro-batch.

    Attributes:
        ids_TK: chosen experts; -1 where the token was dropped.
        probs_TK: weight of each choice.
        auxiliary_loss: scalar to be added to the training loss, or None.
    """

    ids_TK: Tensor
    probs_TK: Tensor
    auxiliary_loss: Tensor | None
    stats: MoEStats


class Router(nn.Module):
    """Scores tokens against E expert vectors, in fp32 whatever the model's dtype, and takes the best K.

    All tensor-parallel ranks route all tokens alike.

    Args:
        layer: index of the transformer layer, which seeds its noise.
        moe_index: index among MoE layers, the row of load statistics.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, init_std: float, layer: int, moe_index: int,
                 state: ParallelState, dtype: torch.dtype):  # fmt: skip
        super().__init__()
        self.config, self.layer, self.moe_index, self.state = config, layer, moe_index, state
        dtype = torch.promote_types(dtype, torch.float32)
        shape = (config.num_experts, hidden_size)
        self.weight = new_parameter(shape, token_wise_spec(state), Init(std=init_std), state, dtype)

    def forward(self, x_TH: Tensor, context: ForwardContext) -> Routing:
        """Returns the routing of T = B * S tokens, also where x_TH is this rank's share of them."""
        config = self.config
        x_TH = x_TH.to(self.weight.dtype)
        if context.training and config.moe_input_jitter_eps:
            x_TH = self._jitter(x_TH, context)
        logits_TE = F.linear(x_TH, self.weight)
        if self.state.sequence_parallel:
            logits_TE = gather_tokens(logits_TE, self.state.tp)
        gate = topk_gate(
            logits_TE,
            config.moe_router_topk,
            config.moe_router_score_function,
            config.pre_softmax,
            num_groups=context.batch_size,
        )
        ids_TK = gate.ids_TK
        if context.training and config.moe_expert_capacity_factor is not None:
            capacity = expert_capacity(ids_TK.numel() // context.batch_size, config)
            ids_TK = drop_over_capacity(ids_TK, gate.probs_TK, capacity, context.batch_size, config)
        balance = balance_sum(gate, config.balance_group_size if context.training else 1, self.state.dp)
        stats = MoEStats(
            moe_index=self.moe_index,
            counts_E=gate.counts_GE.sum(0),
            z_sum=gate.z_sum.detach(),
            balance=balance.detach(),
            num_dropped=(ids_TK < 0).sum(),
        )
        loss = auxiliary_loss(gate, balance, config, context) if context.training else None
        return Routing(ids_TK, gate.probs_TK, loss, stats)

    def _jitter(self, x_TH: Tensor, context: ForwardContext) -> Tensor:
        assert context.random is not None
        eps = self.config.moe_input_jitter_eps
        parts, part = (self.state.tp.size, self.state.tp.rank) if self.state.sequence_parallel else (1, 0)
        shape = (x_TH.shape[0] * parts // context.batch_size, x_TH.shape[1])
        noise = context.random.uniform(shape, x_TH.device, self.layer, "jitter").chunk(parts)[part]
        return x_TH * noise.mul_(2 * eps).add_(1 - eps).to(x_TH.dtype)
