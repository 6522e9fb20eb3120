"""Score functions of routers, one class each: how scores choose, what they learn, and how large their weights begin.

The mean squares of weights at the start, from which `branch_scale` has the spread of experts' first weights, are estimated
over a fixed sample of independent normal logits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.ops.topk_gate import GateResult, expert_choice, gate_by_rule, threshold_gate
from megatron_samoe.parallel_state.parameter_tag import ONES, Init, ParameterTag
from megatron_samoe.tensor_parallel.layers import new_parameter, token_wise_spec

#: Logits drawn to estimate a mean square; its relative error stays under 1 %.
_SAMPLES, _FEWEST_TOKENS = 1 << 20, 4096
#: Least and largest weight of the loss of --moe-router-score-function relu, from where it can still come back.
_LOSS_WEIGHTS = (1e-8, 1e8)


class TopkScore:
    """A softmax or sigmoid of logits, of which each token takes the best K.

    A `router` is the one whose scores these are, and which has their parameters.
    """

    #: Whether a score grows in proportion to its logit; else to its exponential.
    is_linear = False

    def __init__(self, config: MoEConfig):
        self.config, self.topk = config, config.moe_router_topk

    def prepare(self, router: Any, num_experts: int, dtype: torch.dtype) -> None:
        """Gives a router the parameters that the scores have."""

    def kept_choices(self, num_experts: int) -> tuple[float, int]:
        """Returns the experts that a token visits on average, at the worst time of a run, and the width of ids and weights."""
        return self.topk, self.topk

    def logits(self, logits_TE: Tensor, router: Any) -> Tensor:
        """Returns what scores are made of."""
        return logits_TE

    def select(self, logits_TE: Tensor, num_sequences: int, router: Any) -> GateResult:
        """Returns the choice of tokens, which are complete sequences."""
        return gate_by_rule(logits_TE, router.rule(), num_sequences)

    def after_step(self, visited: Tensor, router: Any) -> None:
        """Changes what no gradient does; see `Router.after_step`."""

    def mean_squares(self, num_experts: int, logit_std: float) -> float:
        """Returns sum_k E[p_k^2] of a token's weights at the start."""
        return _topk_squares(num_experts, self.topk, self._is_sigmoid, self.config.pre_softmax, logit_std)

    def undecided_sum(self, num_experts: int) -> float:
        """Returns the sum of a token's weights where all logits are 0."""
        share = 0.5 if self._is_sigmoid else 1 / num_experts
        return self.topk * share if self.config.pre_softmax else 1.0

    @property
    def _is_sigmoid(self) -> bool:
        return self.config.moe_router_score_function == "sigmoid"


class ExpertChoiceScore(TopkScore):
    """A softmax of logits, by which each expert takes its best tokens."""

    def kept_choices(self, num_experts: int) -> tuple[float, int]:
        return self.topk, num_experts

    def select(self, logits_TE: Tensor, num_sequences: int, router: Any) -> GateResult:
        return expert_choice(logits_TE, self.topk, num_sequences)

    def mean_squares(self, num_experts: int, logit_std: float) -> float:
        return _choice_squares(num_experts, self.topk, logit_std)


class NormScore(TopkScore):
    """UniPool's NormRouter: a learned factor times ReLU(logits / their length), which are weights as they are."""

    is_linear = True

    def prepare(self, router: Any, num_experts: int, dtype: torch.dtype) -> None:
        """Adds the factor, with which weights of the chosen experts begin with a sum of 1 on average."""
        tag = ParameterTag(token_wise_spec(router.state), Init(mean=_norm_start(num_experts, self.topk)))
        router.scale = new_parameter((1,), tag, router.state, dtype)

    def logits(self, logits_TE: Tensor, router: Any) -> Tensor:
        return router.scale * F.normalize(logits_TE, dim=1)

    def mean_squares(self, num_experts: int, logit_std: float) -> float:
        return _norm_squares(num_experts, self.topk)


class ReluScore(TopkScore):
    """ReMoE (arXiv:2412.14711): ReLU(logits) are weights of all experts where they are positive. A balance loss whose own
    weight follows the number of visited experts keeps that near K."""

    is_linear = True

    def prepare(self, router: Any, num_experts: int, dtype: torch.dtype) -> None:
        """Adds the weight of the loss."""
        router.loss_weight = new_parameter((1,), ParameterTag(init=ONES), router.state, dtype)
        router.loss_weight.requires_grad_(False)

    def kept_choices(self, num_experts: int) -> tuple[float, int]:
        """See `TopkScore`: half of all at the start."""
        return max(num_experts / 2, self.topk), num_experts

    def select(self, logits_TE: Tensor, num_sequences: int, router: Any) -> GateResult:
        return threshold_gate(logits_TE, num_sequences, router.loss_weight)

    def after_step(self, visited: Tensor, router: Any) -> None:
        """Moves the weight of the loss."""
        rate = 1.0 + self.config.moe_router_relu_update_rate
        factor = torch.where(visited > self.topk, rate, 1.0 / rate)
        router.loss_weight.mul_(factor).clamp_(*_LOSS_WEIGHTS)

    def mean_squares(self, num_experts: int, logit_std: float) -> float:
        return num_experts * logit_std**2 / 2


_SCORES = {"softmax": TopkScore, "sigmoid": TopkScore, "norm": NormScore, "relu": ReluScore}


def score_of(config: MoEConfig) -> TopkScore:
    """Returns the scores that a configuration asks for."""
    kind = ExpertChoiceScore if config.moe_router_expert_choice else _SCORES[config.moe_router_score_function]
    return kind(config)


@lru_cache(maxsize=256)
def _topk_squares(num_experts: int, topk: int, is_sigmoid: bool, pre_softmax: bool, logit_std: float) -> float:
    # The weights of ops/topk_gate.py; its counts and losses would take as long again.
    logits_TE = _normal(num_experts).mul_(logit_std)
    if is_sigmoid:
        logits_TE = F.logsigmoid(logits_TE)
    if pre_softmax:
        probs_TK = (logits_TE.exp() if is_sigmoid else logits_TE.softmax(1)).topk(topk).values
    else:
        probs_TK = logits_TE.topk(topk).values.softmax(1)
    return float(probs_TK.double().square().sum(1).mean())


@lru_cache(maxsize=256)
def _choice_squares(num_experts: int, topk: int, logit_std: float) -> float:
    scores_TE = _normal(num_experts).mul_(logit_std).softmax(-1)
    capacity = max(len(scores_TE) * topk // num_experts, 1)
    return float(scores_TE.topk(capacity, dim=0).values.double().square().sum() / len(scores_TE))


@lru_cache(maxsize=256)
def _norm_squares(num_experts: int, topk: int) -> float:
    probs_TK = _norm_start(num_experts, topk) * _largest_normed(num_experts, topk)
    return float(probs_TK.double().square().sum(1).mean())


@lru_cache(maxsize=256)
def _norm_start(num_experts: int, topk: int) -> float:
    return 1.0 / float(_largest_normed(num_experts, topk).double().sum(1).mean())


def _largest_normed(num_experts: int, topk: int) -> Tensor:
    return F.normalize(_normal(num_experts), dim=1).relu().topk(topk, dim=1).values


def _normal(num_experts: int) -> Tensor:
    tokens = max(_SAMPLES // num_experts, _FEWEST_TOKENS)
    return torch.empty(tokens, num_experts).normal_(generator=torch.Generator().manual_seed(0))
