"""How wide the experts' output projections begin, so that an MoE layer starts as strong as a dense MLP.

An expert's output is weighed by its score, near 1/E for a top-1 softmax, and an expert of width F / K has K times fewer
neurons than the MLP it replaces. With the MLP's own spread the layer would begin up to E times weaker, and learn later
for it. Outputs of different experts are independent at the start, so their variances add:

    variance / MLP's = sum_k E[p_k^2] * F_expert / F * s^2

with p_k the weights of the chosen experts. The spread of w2 is multiplied by the s that makes this 1. A shared expert and
the routed ones divide the variance by their active widths. Only initial values change: nothing to know for an export.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.moe.scores import score_of


class BranchScale(NamedTuple):
    """Factors on the initial spread of output projections: routed experts' w2 and the shared expert's."""

    routed: float
    shared: float


def router_init_std(config: PretrainConfig) -> float:
    """Returns the spread of a router's initial weights."""
    std = config.moe.moe_router_init_method_std
    return config.model.hidden_size**-0.5 if std is None else std


def branch_scale(config: PretrainConfig, num_experts: int) -> BranchScale:
    """Returns the factors that --moe-scale-output-init asks for in a layer of `num_experts`."""
    moe, mlp_size = config.moe, config.model.mlp_size
    if not moe.moe_scale_output_init:
        return BranchScale(1.0, 1.0)
    # The router sees normalised tokens, of length sqrt(H).
    logit_std = router_init_std(config) * config.model.hidden_size**0.5
    score = score_of(moe)
    squares = score.mean_squares(num_experts, logit_std) * moe.weight_factor**2
    shared_size = config.shared_expert_size or 0
    if moe.moe_residual_mlp:
        # Either side gives half of the variance, weighed by 1/2 at the start.
        routed = mlp_size / max(config.expert_ffn_size, 1)
        return BranchScale(routed=(2 * routed / squares) ** 0.5, shared=(2 * mlp_size / max(shared_size, 1)) ** 0.5)
    active = score.topk * config.expert_ffn_size + shared_size
    ratio = mlp_size / max(active, 1)
    at_start = 0.5 if moe.moe_shared_expert_gate else 1.0
    return BranchScale(routed=(score.topk * ratio / squares) ** 0.5, shared=ratio**0.5 / at_start)
