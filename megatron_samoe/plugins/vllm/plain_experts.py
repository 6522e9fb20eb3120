"""Experts that vLLM's fused kernels do not compute (GELU, biases, odd widths), in plain torch behind one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_samoe.convert.hf.remote_code.moe_samoe import Experts, activate, run_experts


@torch.library.custom_op("megatron_samoe_vllm::plain_experts", mutates_args=())
def plain_experts(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    scale: Tensor | None,
) -> Tensor:
    """Returns y_TH; only experts that are hit run, which no compiler could know: so it is an op."""

    def run(index: int, x_RH: Tensor) -> Tensor:
        h = F.linear(x_RH, up[index], None if up_bias is None else up_bias[index])
        h = h if scale is None else h * scale.to(h.dtype)
        return F.linear(activate(h, act), down[index], None if down_bias is None else down_bias[index])

    y_TH: Tensor = run_experts(x_TH, ids_TK, weights_TK, len(up), run)
    return y_TH.clone() if y_TH is x_TH else y_TH


@plain_experts.register_fake
def _(x_TH, *others):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TH)


class PlainExperts(nn.Module):
    """Takes the parameters of packed experts, under their names, and computes what they do."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.up, self.act = experts.up, experts.act
        for name, parameter in experts.named_parameters():
            self.register_parameter(name, parameter)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """Returns y_TH of x_TH, ids_TK and weights_TK; see `Experts.forward`."""
        biases = [getattr(self, f"{name}_bias", None) for name in (self.up, "down_proj")]
        up = getattr(self, self.up)
        return plain_experts(hidden_states, top_k_index, top_k_weights, up, self.down_proj, *biases, self.act, scale)
