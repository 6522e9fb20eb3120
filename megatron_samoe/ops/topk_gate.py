"""The router's arithmetic in one op: scores, top-k choice, counts, and the sums that the balancing losses need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_samoe.ops import extension, reference, rows_by_gather
from megatron_samoe.ops.asynchronous import runs_behind_host

SCORE_FUNCTIONS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class ChoiceRule:
    """How a router chooses by its logits.

    Attributes:
        score_function, pre_softmax: see `topk_gate`; or "norm" (UniPool's NormRouter), see `relu_gate`.
        bias_E: added to scores where experts are chosen, not to their weights (DeepSeek-V3).
        num_groups: consecutive groups of experts, of which a token may use `group_topk`: those whose best K / group_topk
            experts have the largest sum; 0: it may use all.
        factor: on the chosen experts' weights.
        candidates_E: factors on scores, which logits have already (`limited`); an expert with 0 is not chosen.
    """

    topk: int
    score_function: str = "softmax"
    pre_softmax: bool = False
    bias_E: Tensor | None = None
    num_groups: int = 0
    group_topk: int = 0
    factor: float = 1.0
    candidates_E: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether only a softmax or sigmoid of the logits decides."""
        others = self.bias_E is not None or self.candidates_E is not None or self.num_groups != 0 or self.factor != 1.0
        return not others and self.score_function in SCORE_FUNCTIONS

    def key(self, logits_TE: Tensor) -> Tensor | None:
        """Returns the values by which experts are chosen, if not the logits: the score with a bias, in the best groups only.

        Scores are those among all experts; or logits, where a softmax over the chosen follows, as in Megatron.
        """
        if self.bias_E is None and not self.num_groups:
            return None
        key_TE = logits_TE = logits_TE.detach()
        if self.score_function == "sigmoid":
            key_TE = logits_TE.sigmoid()
        elif self.score_function == "softmax" and (self.pre_softmax or self.bias_E is not None):
            key_TE = logits_TE.softmax(-1)
        if self.bias_E is not None:
            key_TE = key_TE + self.bias_E
        if self.candidates_E is not None:
            key_TE = key_TE.masked_fill(self.candidates_E == 0, -torch.inf)
        if self.num_groups:
            key_TE = limit_to_groups(key_TE, self.num_groups, self.group_topk, self.topk // self.group_topk)
        if self.score_function == "norm":
            # A bias does not choose an expert without a score: it would count as idle, and its bias rise for ever.
            key_TE = key_TE.masked_fill(logits_TE <= 0, -torch.inf)
        return key_TE


@dataclass(frozen=True)
class GateResult:
    """The router's decisions for T tokens.

    probs_TK: weight of each chosen expert, in the logits' dtype; differentiable.
    ids_TK: chosen experts by falling logit (or key), int64; equal ones by the lower id.
    counts_GE: routed slots per group and expert, int64.
    score_sum_GE: sum over the group's tokens of the full distribution over experts; differentiable.
    z_sum: sum over all tokens of logsumexp(logits)^2; differentiable.
    """

    probs_TK: Tensor
    ids_TK: Tensor
    counts_GE: Tensor
    score_sum_GE: Tensor
    z_sum: Tensor


class _TopkGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        topk: int,
        sigmoid: bool,
        pre_softmax: bool,
        num_sequences: int,
        key_TE: Tensor | None,
    ) -> tuple[Tensor, ...]:
        probs_TK, ids_TK, counts_GE, score_sum_GE, z_sum, logsumexp_T = torch.ops.megatron_samoe.topk_gate(
            logits_TE, topk, sigmoid, pre_softmax, num_sequences, key_TE
        )
        ctx.save_for_backward(logits_TE, logsumexp_T, probs_TK, ids_TK)
        ctx.flags = (sigmoid, pre_softmax, num_sequences)
        ctx.mark_non_differentiable(ids_TK, counts_GE)
        ctx.set_materialize_grads(False)
        return probs_TK, ids_TK, counts_GE, score_sum_GE, z_sum

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dprobs_TK: Tensor | None, _ids: None, _counts: None, dscore_sum_GE: Tensor | None, dz: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits_TE, logsumexp_T, probs_TK, ids_TK = ctx.saved_tensors
        dlogits_TE = torch.ops.megatron_samoe.topk_gate_backward(
            logits_TE,
            logsumexp_T,
            probs_TK,
            ids_TK,
            None if dprobs_TK is None else dprobs_TK.contiguous(),
            None if dscore_sum_GE is None else dscore_sum_GE.contiguous(),
            dz,
            *ctx.flags,
        )
        return dlogits_TE, None, None, None, None, None


def topk_gate(
    logits_TE: Tensor,
    topk: int,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    num_sequences: int = 1,
    key_TE: Tensor | None = None,
) -> GateResult:
    """Scores the experts of every token and chooses the best `topk`.

    Args:
        logits_TE: router logits, fp32 in training (a bf16 router is cast by the caller), or fp64.
        score_function: "softmax", or "sigmoid" (DeepSeek-V3, arXiv:2412.19437, equation 15).
        pre_softmax: True: probs are the chosen experts' scores as they are (Switch's top-1, arXiv:2101.03961). False:
            they are normalised over the chosen experts, by a softmax over their logits or, for sigmoid scores, by
            their sum (GShard's top-2, arXiv:2006.16668).
        num_sequences: G; sequence g is the g-th block of T / G consecutive tokens, counted by itself. Groups of experts are
            those of a `ChoiceRule`.
        key_TE: key by which experts are chosen, if not the logit; it has no gradient.

    A NaN logit is chosen first and makes the token's probabilities NaN; ids stay in range.

    Raises:
        ValueError: topk is not in 1..E, G does not divide T, or the logits are not a floating-point matrix.
    """
    if logits_TE.dim() != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"logits_TE must be a floating-point matrix, not {logits_TE.dtype} {tuple(logits_TE.shape)}")
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function = {score_function!r}: one of {', '.join(SCORE_FUNCTIONS)}")
    num_tokens, num_experts = logits_TE.shape
    if not 1 <= topk <= num_experts:
        raise ValueError(f"topk = {topk}: from 1 to the number of experts, {num_experts}")
    if num_sequences < 1 or num_tokens % num_sequences:
        raise ValueError(f"num_sequences = {num_sequences}: a divisor of the number of tokens, {num_tokens}")
    sigmoid = score_function == "sigmoid"
    if key_TE is not None and (key_TE.shape != logits_TE.shape or key_TE.dtype != logits_TE.dtype):
        raise ValueError(f"key_TE must be as logits_TE, not {key_TE.dtype} {tuple(key_TE.shape)}")
    if logits_TE.dtype == torch.float32 and extension.serves(logits_TE, cuda="gate"):
        key_TE = None if key_TE is None else key_TE.detach().contiguous()
        return GateResult(*_TopkGate.apply(logits_TE.contiguous(), topk, sigmoid, pre_softmax, num_sequences, key_TE))
    return GateResult(*reference.topk_gate(logits_TE, topk, sigmoid, pre_softmax, num_sequences, key_TE))


def limit_to_groups(key_TE: Tensor, num_groups: int, group_topk: int, topk: int) -> Tensor:
    """Returns the keys with -inf outside the `group_topk` groups of each token whose best `topk` keys sum to most."""
    key_TGE = key_TE.unflatten(1, (num_groups, -1))
    best_Tg = key_TGE.topk(topk, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
    is_open_TG = torch.zeros(key_TGE.shape[:2], dtype=torch.bool, device=key_TE.device).scatter_(1, best_Tg, True)
    return key_TGE.masked_fill(~is_open_TG[:, :, None], -torch.inf).flatten(1)


def limited(logits_TE: Tensor, factors_E: Tensor, multiplies: bool) -> Tensor:
    """Returns logits whose scores have the factors.

    Args:
        multiplies: whether a score grows in proportion to its logit; else to its exponential.
    """
    return logits_TE * factors_E if multiplies else logits_TE + factors_E.log()


def gate_by_rule(logits_TE: Tensor, rule: ChoiceRule, num_sequences: int = 1) -> GateResult:
    """Chooses by a rule; logits of "norm" scores have their length already. Groups are of tokens, as `topk_gate` has them."""
    key_TE = rule.key(logits_TE)
    if rule.score_function == "norm":
        gate = relu_gate(logits_TE, rule.topk, num_sequences, key_TE)
    else:
        gate = topk_gate(logits_TE, rule.topk, rule.score_function, rule.pre_softmax, num_sequences, key_TE)
    return gate if rule.factor == 1.0 else replace(gate, probs_TK=gate.probs_TK * rule.factor)


def relu_gate(logits_TE: Tensor, topk: int, num_sequences: int, key_TE: Tensor | None = None) -> GateResult:
    """Chooses as `topk_gate`, but only experts with a positive logit; ids of others are -1.

    Weights are ReLU(logit) as they are, and the distribution is their share of the sum over all experts.
    """
    scores_TE = logits_TE.relu()
    ids_TK = reference.largest(logits_TE.detach() if key_TE is None else key_TE, topk)
    ids_TK = ids_TK.masked_fill(scores_TE.detach().gather(1, ids_TK) <= 0, -1)
    probs_TK = scores_TE.gather(1, ids_TK.clamp_min(0)) * (ids_TK >= 0)
    distribution_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
    return described(logits_TE, ids_TK, probs_TK, num_sequences, distribution_TE)


def threshold_gate(logits_TE: Tensor, num_sequences: int, loss_weight: Tensor) -> GateResult:
    """Chooses every expert whose logit is positive, with ReLU(logit) as its weight (ReMoE, arXiv:2412.14711).

    Args:
        loss_weight: [1], factor on what balance losses see of the scores, which are not normalised.

    Returns:
        ids and weights of width E; ids are -1 where an expert is not chosen.
    """
    scores_TE = logits_TE.relu()
    ids_TE = torch.where(scores_TE > 0, torch.arange(logits_TE.shape[1], device=logits_TE.device), -1)
    return described(logits_TE, ids_TE, scores_TE, num_sequences, scores_TE * loss_weight)


def expert_choice(logits_TE: Tensor, topk: int, num_sequences: int) -> GateResult:
    """Lets each expert take the T * topk / (G * E) tokens of each group that score it highest (arXiv:2202.09368).

    Weights are the experts' shares of a softmax over all; a token has from no to all experts.

    Returns:
        ids and weights of width E; ids are -1 where an expert did not take the token.
    """
    num_tokens, num_experts = logits_TE.shape
    scores_GTE = logits_TE.softmax(-1).view(num_sequences, -1, num_experts)
    capacity = max(num_tokens // num_sequences * topk // num_experts, 1)
    taken = scores_GTE.detach().topk(capacity, dim=1).indices
    mask_TE = torch.zeros_like(scores_GTE).scatter_(1, taken, 1.0).view_as(logits_TE)
    ids_TE = torch.where(mask_TE > 0, torch.arange(num_experts, device=logits_TE.device), -1)
    return described(logits_TE, ids_TE, scores_GTE.view_as(logits_TE) * mask_TE, num_sequences)


def described(
    logits_TE: Tensor, ids_TK: Tensor, probs_TK: Tensor, num_sequences: int, distribution_TE: Tensor | None = None
) -> GateResult:
    """Returns the gate result of a choice that was made elsewhere: counts, and sums over a distribution of all experts.

    Args:
        ids_TK: int64, up to K chosen experts of each token; -1, with a weight of 0, where a token has fewer.
        distribution_TE: each expert's share of a token; a softmax of all logits if not given.

    Raises:
        ValueError: shapes or types do not fit, or an id is outside -1..E-1 (a device's assertion, where it runs behind the
            host).
    """
    num_tokens, num_experts = logits_TE.shape
    if ids_TK.dtype != torch.int64 or ids_TK.dim() != 2 or len(ids_TK) != num_tokens:
        raise ValueError(f"ids_TK must be int64 [{num_tokens}, K], not {ids_TK.dtype} {tuple(ids_TK.shape)}")
    if probs_TK.shape != ids_TK.shape or probs_TK.dtype != logits_TE.dtype:
        raise ValueError(
            f"probs_TK must be {logits_TE.dtype} {tuple(ids_TK.shape)}, not {probs_TK.dtype} {tuple(probs_TK.shape)}"
        )
    if (
        not runs_behind_host(ids_TK.device)
        and ids_TK.numel()
        and not (ids_TK.min() >= -1 and ids_TK.max() < num_experts)
    ):
        raise ValueError(f"ids_TK has {int(ids_TK.min())} to {int(ids_TK.max())}; allowed are -1 to {num_experts - 1}")
    slots_GN = rows_by_gather.buckets(ids_TK, num_experts).view(num_sequences, -1)
    counts_GE = torch.zeros(num_sequences, num_experts + 1, dtype=torch.int64, device=ids_TK.device)
    counts_GE = counts_GE.scatter_add_(1, slots_GN, torch.ones_like(slots_GN))[:, :num_experts]
    distribution_TE = logits_TE.softmax(-1) if distribution_TE is None else distribution_TE
    scores_GE = distribution_TE.view(num_sequences, -1, num_experts).sum(1)
    return GateResult(probs_TK, ids_TK, counts_GE, scores_GE, logits_TE.logsumexp(-1).square().sum())
