"""How wide the experts' output projections begin, so that an MoE layer starts as strong as a dense MLP.

An expert's output is weighed by its score, near 1/E for a top-1 softmax, and an expert of width F / K has K times fewer
neurons than the MLP it replaces. With the MLP's own spread the layer would begin up to E times weaker, and learn later
for it. Outputs of different experts are independent at the start, so their variances add:

    variance / MLP's = sum_k E[p_k^2] * F_expert / F * s^2

with p_k the weights of the chosen experts. The spread of w2 is multiplied by the s that makes this 1. A shared expert and
the routed ones divide the variance by their active widths. Only initial values change: nothing to know for an export.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.ops import reference

#: Logits drawn to estimate E[p_k^2]; its relative error stays under 1 %.
_SAMPLES, _FEWEST_TOKENS = 1 << 20, 4096


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
    kind = "expert choice" if moe.moe_router_expert_choice else moe.moe_router_score_function
    squares = (
        mean_squared_weights(num_experts, moe.moe_router_topk, kind, moe.pre_softmax, logit_std)
        * (moe.moe_router_topk_scaling_factor or 1.0) ** 2
    )
    shared_size = config.shared_expert_size or 0
    if moe.moe_residual_mlp:
        # Either side gives half of the variance, weighed by 1/2 at the start.
        routed = mlp_size / max(config.expert_ffn_size, 1)
        return BranchScale(routed=(2 * routed / squares) ** 0.5, shared=(2 * mlp_size / max(shared_size, 1)) ** 0.5)
    active = moe.moe_router_topk * config.expert_ffn_size + shared_size
    ratio = mlp_size / max(active, 1)
    at_start = 0.5 if moe.moe_shared_expert_gate else 1.0
    return BranchScale(routed=(moe.moe_router_topk * ratio / squares) ** 0.5, shared=ratio**0.5 / at_start)


@lru_cache(maxsize=256)
def mean_squared_weights(
    num_experts: int, topk: int, score_function: str, pre_softmax: bool, logit_std: float
) -> float:
    """Returns sum_k E[p_k^2] over independent normal logits, estimated from a fixed sample."""
    logits_TE = _normal(num_experts).mul_(logit_std)
    if score_function == "relu":
        return num_experts * logit_std**2 / 2
    if score_function == "expert choice":
        scores_TE = logits_TE.softmax(-1)
        capacity = max(len(scores_TE) * topk // num_experts, 1)
        return float(scores_TE.topk(capacity, dim=0).values.double().square().sum() / len(scores_TE))
    if score_function == "norm":
        probs_TK = norm_start(num_experts, topk) * _largest_normed(num_experts, topk)
    else:
        probs_TK, *_ = reference.topk_gate(logits_TE, topk, score_function == "sigmoid", pre_softmax, 1)
    return float(probs_TK.double().square().sum(1).mean())


@lru_cache(maxsize=256)
def norm_start(num_experts: int, topk: int) -> float:
    """Returns the factor of ReLU(logits / their length) with which the chosen experts' weights begin with a sum of 1 on
    average, over independent normal logits: a Monte-Carlo estimate from a fixed sample."""
    return 1.0 / float(_largest_normed(num_experts, topk).double().sum(1).mean())


def _largest_normed(num_experts: int, topk: int) -> Tensor:
    return torch.nn.functional.normalize(_normal(num_experts), dim=1).relu().topk(topk, dim=1).values


def _normal(num_experts: int) -> Tensor:
    tokens = max(_SAMPLES // num_experts, _FEWEST_TOKENS)
    return torch.empty(tokens, num_experts).normal_(generator=torch.Generator().manual_seed(0))
