"""The reference implementation of every op: the specification, the fallback without the extension, and the oracle of its tests.

Plain torch, differentiable through autograd, any floating dtype. Sums are held in fp32, or in fp64 for fp64 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.ops.attention import ScoreRule
from megatron_samoe.ops.extension import accumulation_dtype


def attention_piece(
    q_BASD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns y_BASD in q's dtype and lse_BAS, as ops/attention_pieces.py defines them."""
    scores, v = _piece_scores(q_BASD, k_BGLD, is_causal, scale), _for_heads(v_BGLD, q_BASD)
    lse_BAS = torch.logsumexp(scores, -1)
    return ((scores - lse_BAS[..., None]).exp() @ v.to(scores.dtype)).to(q_BASD.dtype), lse_BAS


def attention_piece_backward(
    dy_BASD: Tensor,
    q_BASD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    y_BASD: Tensor,
    lse_BAS: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq_BASD, dk_BGLD and dv_BGLD in their inputs' dtypes: with probabilities p = exp(score - lse) of all keys,

    dv = p^T dy, dscore = p (dy v^T - <dy, y>), dq = dscore k scale, dk = dscore^T q scale, summed over the heads of a group.
    """
    scores = _piece_scores(q_BASD, k_BGLD, is_causal, scale)
    wide, groups = scores.dtype, k_BGLD.shape[1]
    p, (dy, q) = (scores - lse_BAS[..., None]).exp(), (t.to(wide) for t in (dy_BASD, q_BASD))
    k, v = (_for_heads(t, q).to(wide) for t in (k_BGLD, v_BGLD))
    dscores = p * (dy @ v.mT - (dy * y_BASD.to(wide)).sum(-1, keepdim=True)) * scale
    dk, dv = ((t.mT @ of).unflatten(1, (groups, -1)).sum(2) for t, of in ((dscores, q), (p, dy)))
    return (dscores @ k).to(q_BASD.dtype), dk.to(k_BGLD.dtype), dv.to(v_BGLD.dtype)


def _piece_scores(q_BASD: Tensor, k_BGLD: Tensor, is_causal: bool, scale: float) -> Tensor:
    dtype = accumulation_dtype(q_BASD.dtype)
    scores = q_BASD.to(dtype) @ _for_heads(k_BGLD, q_BASD).to(dtype).mT * scale
    after = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(after, -torch.inf) if is_causal else scores


def _for_heads(k_BGLD: Tensor, q_BASD: Tensor) -> Tensor:
    return k_BGLD.repeat_interleave(q_BASD.shape[1] // k_BGLD.shape[1], 1)


def largest(key_TE: Tensor, topk: int) -> Tensor:
    """Returns ids_TK by falling key: NaN above everything, equal keys by the lower id."""
    return torch.sort(key_TE, dim=1, descending=True, stable=True).indices[:, :topk].contiguous()


def topk_gate(
    logits_TE: Tensor, topk: int, sigmoid: bool, pre_softmax: bool, num_sequences: int, key_TE: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns probs_TK, ids_TK, counts_GE, score_sum_GE and z_sum of the router, as ops/topk_gate.py defines them.

    Experts are ordered by key_TE where it is given, else by logit.
    """
    num_tokens, num_experts = logits_TE.shape
    ids_TK = largest(logits_TE.detach() if key_TE is None else key_TE, topk)
    if sigmoid:
        # Scores over their sum are a softmax of their logarithms, where small ones do not vanish.
        log_scores_TE = F.logsigmoid(logits_TE)
        distribution_TE = torch.softmax(log_scores_TE, dim=1)
        chosen_TK = log_scores_TE.gather(1, ids_TK)
        probs_TK = chosen_TK.exp() if pre_softmax else torch.softmax(chosen_TK, dim=1)
    else:
        distribution_TE = torch.softmax(logits_TE, dim=1)
        if pre_softmax:
            probs_TK = distribution_TE.gather(1, ids_TK)
        else:
            probs_TK = torch.softmax(logits_TE.gather(1, ids_TK), dim=1)
    score_sum_GE = distribution_TE.view(num_sequences, num_tokens // num_sequences, num_experts).sum(dim=1)
    ids_GN = ids_TK.reshape(num_sequences, num_tokens // num_sequences * topk)
    counts_GE = torch.zeros(num_sequences, num_experts, dtype=torch.int64, device=logits_TE.device)
    counts_GE.scatter_add_(1, ids_GN, torch.ones_like(ids_GN))
    z_sum = torch.logsumexp(logits_TE, dim=1).square().sum()
    return probs_TK, ids_TK, counts_GE, score_sum_GE, z_sum


def make_permutation(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns slot_of_row_N, row_of_slot_TK, counts_E, ends_E: slots (token-major) stably sorted by expert, -1 dropped."""
    ids_S = ids_TK.reshape(-1)
    order_S = torch.sort(ids_S, stable=True).indices
    num_dropped = int((ids_S < 0).sum())
    slot_of_row_N = order_S[num_dropped:]
    row_of_slot_S = torch.full_like(ids_S, -1)
    row_of_slot_S[slot_of_row_N] = torch.arange(slot_of_row_N.numel(), device=ids_S.device)
    counts_E = torch.bincount(ids_S[slot_of_row_N], minlength=num_experts)
    return slot_of_row_N, row_of_slot_S.view_as(ids_TK), counts_E, counts_E.cumsum(0, dtype=torch.int32)


def permute(x_TH: Tensor, slot_of_row_N: Tensor, topk: int) -> Tensor:
    """Returns rows_NH: row r is a copy of the token that owns its slot."""
    token_of_row_N = torch.div(slot_of_row_N, topk, rounding_mode="floor")
    # The detour through the accumulation type is for the backward: index_select sums gradients in its input's type.
    return x_TH.to(accumulation_dtype(x_TH.dtype)).index_select(0, token_of_row_N).to(x_TH.dtype)


def unpermute(rows_NH: Tensor, probs_TK: Tensor, slot_of_row_N: Tensor) -> Tensor:
    """Returns y_TH in the rows' dtype: for each token the sum of its rows, each times its probability."""
    num_tokens, topk = probs_TK.shape
    dtype = accumulation_dtype(rows_NH.dtype)
    prob_of_row_N = probs_TK.to(dtype).reshape(-1).index_select(0, slot_of_row_N)
    token_of_row_N = torch.div(slot_of_row_N, topk, rounding_mode="floor")
    y_TH = torch.zeros(num_tokens, rows_NH.shape[1], dtype=dtype, device=rows_NH.device)
    return y_TH.index_add(0, token_of_row_N, rows_NH.to(dtype) * prob_of_row_N[:, None]).to(rows_NH.dtype)


def gather_rows(x_RH: Tensor, index_R: Tensor) -> Tensor:
    """Returns y_RH with y[r] = x[index[r]]; index is a bijection."""
    return x_RH.index_select(0, index_R)


def combine_banks(coefficients_LGP: Tensor, banks_PGN: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Returns W_LGN: W[l, g] = sum over p of coefficients[l, g, p] * banks[p, g]."""
    dtype = accumulation_dtype(banks_PGN.dtype)
    return torch.einsum("lgp,pgn->lgn", coefficients_LGP.to(dtype), banks_PGN.to(dtype)).to(out_dtype)


def combine_banks_backward(coefficients_LGP: Tensor, banks_PGN: Tensor, dW_LGN: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients dbanks_PGN and dcoefficients_LGP of combine_banks for dW_LGN.

    dbanks[p, g] = sum over l of coefficients[l, g, p] * dW[l, g]; dcoefficients[l, g, p] = <dW[l, g], banks[p, g]>.
    """
    dtype = accumulation_dtype(banks_PGN.dtype)
    dW_LGN = dW_LGN.to(dtype)
    dbanks_PGN = torch.einsum("lgp,lgn->pgn", coefficients_LGP.to(dtype), dW_LGN)
    # Millions of products: an fp32 sum would lose three digits.
    sums_LP = [
        [(dW_GN * bank_GN).sum(dim=1, dtype=torch.float64) for bank_GN in banks_PGN.to(dtype)] for dW_GN in dW_LGN
    ]
    dcoefficients_LGP = torch.stack([torch.stack(sums_P, dim=1) for sums_P in sums_LP]).to(dtype)
    return dbanks_PGN, dcoefficients_LGP


def cross_entropy_parts(logits_TV: Tensor, labels_T: Tensor, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns peak_T, sum_T and target_T over the columns first_id .. first_id + V - 1 of the vocabulary.

    These are the largest logit (-inf without columns), the sum of exp(logit - peak), and the label's logit, or 0 where
    the label is in another part.
    """
    num_tokens, width = logits_TV.shape
    logits_TV = logits_TV.to(accumulation_dtype(logits_TV.dtype))
    if not width:
        zeros_T = logits_TV.new_zeros(num_tokens)
        return torch.full_like(zeros_T, -torch.inf), zeros_T, zeros_T.clone()
    peak_T = logits_TV.amax(dim=1)
    sum_T = (logits_TV - peak_T[:, None]).exp_().sum(dim=1)
    local_T = labels_T - first_id
    target_T = logits_TV.gather(1, local_T.clamp(0, width - 1)[:, None]).squeeze(1)
    return peak_T, sum_T, target_T.masked_fill((local_T < 0) | (local_T >= width), 0.0)


def cross_entropy_backward(
    logits_TV: Tensor, labels_T: Tensor, first_id: int, logsumexp_T: Tensor, dloss_T: Tensor
) -> Tensor:
    """Returns dlogits_TV = (exp(logit - logsumexp) - [is the label]) * dloss, in the logits' dtype."""
    width = logits_TV.shape[1]
    probs_TV = (logits_TV.to(logsumexp_T.dtype) - logsumexp_T[:, None]).exp_()
    local_T = labels_T - first_id
    mine_T = (local_T >= 0) & (local_T < width)
    if width:
        probs_TV.scatter_add_(1, local_T.clamp(0, width - 1)[:, None], -mine_T.to(probs_TV.dtype)[:, None])
    return probs_TV.mul_(dloss_T[:, None]).to(logits_TV.dtype)


def scaled_logsumexp(logits_TV: Tensor, temperature: float) -> Tensor:
    """Returns lse_T = log sum exp(logits / temperature); -inf without columns."""
    return torch.logsumexp(logits_TV.to(accumulation_dtype(logits_TV.dtype)) / temperature, dim=1)


def kl_divergence_terms(
    student_TV: Tensor, teacher_TV: Tensor, student_lse_T: Tensor, teacher_lse_T: Tensor, temperature: float
) -> Tensor:
    """Returns sum_v p log(p / q) - p + q over these columns, for p = exp(teacher / temperature - lse) and q of the student.

    Over the full vocabulary p and q sum to 1, so the last two cancel; term by term they cancel rounding: what one
    log-sum-exp is off changes the sum in second order only, and no term is below 0.
    """
    log_q_TV = student_TV.to(student_lse_T.dtype) / temperature - student_lse_T[:, None]
    log_p_TV = teacher_TV.to(teacher_lse_T.dtype) / temperature - teacher_lse_T[:, None]
    p_TV = log_p_TV.exp()
    terms_TV = torch.where(p_TV > 0, p_TV * (log_p_TV - log_q_TV), torch.zeros_like(p_TV))
    return (terms_TV - p_TV + log_q_TV.exp()).sum(dim=1)


def kl_divergence_backward(
    student_TV: Tensor,
    teacher_TV: Tensor,
    student_lse_T: Tensor,
    teacher_lse_T: Tensor,
    temperature: float,
    dkl_T: Tensor,
) -> Tensor:
    """Returns dstudent_TV = (q - p) dkl / temperature, in the student's dtype."""
    q_TV = (student_TV.to(dkl_T.dtype) / temperature - student_lse_T[:, None]).exp()
    p_TV = (teacher_TV.to(dkl_T.dtype) / temperature - teacher_lse_T[:, None]).exp()
    return ((q_TV - p_TV) * dkl_T[:, None] / temperature).to(student_TV.dtype)


def grouped_mlp(
    x_RH: Tensor, rows: Sequence[int], w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, gated: bool
) -> Tensor:
    """Returns y_RH in x's dtype: each expert's MLP over its rows, x sorted by expert.

    Without a gate a = gelu(h) in its tanh form for h = x w1^T + b1; with one a = silu(gate) * up. y = a w2^T + b2.
    """
    dtype = accumulation_dtype(x_RH.dtype)
    parts = []
    for e, x in enumerate(x_RH.to(dtype).split(list(rows))):
        h = x @ w1[e].flatten(0, -2).to(dtype).t()
        if b1 is not None:
            h = h + b1[e].flatten().to(dtype)
        if gated:
            gate, up = h.chunk(2, dim=1)
            a = gate * torch.sigmoid(gate) * up
        else:
            a = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        y = a @ w2[e].to(dtype).t()
        parts.append(y if b2 is None else y + b2[e].to(dtype))
    return torch.cat(parts).to(x_RH.dtype)


def adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """Makes one AdamW step in place, the first with step = 1 (Loshchilov and Hutter, arXiv:1711.05101)."""
    grad = grad * grad_scale
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    master.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def attention(
    q_BASD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, rule: ScoreRule, mask_B1SL: Tensor | None = None
) -> Tensor:
    """Returns y_BASD of causal attention with what the rule says, score by score over the full square."""
    queries, keys = q_BASD.shape[2], k_BGLD.shape[2]
    k, v = (t.repeat_interleave(q_BASD.shape[1] // t.shape[1], 1) for t in (k_BGLD, v_BGLD))
    scores = torch.einsum("basd,bald->basl", q_BASD, k) * (rule.scale or q_BASD.shape[-1] ** -0.5)
    if rule.softcap is not None:
        scores = rule.softcap * (scores / rule.softcap).tanh()
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    seen = distance >= 0 if rule.window is None else (distance >= 0) & (distance < rule.window)
    seen = seen.to(q_BASD.device) if mask_B1SL is None else seen.to(q_BASD.device) & mask_B1SL
    weights = scores.exp() * seen
    total = weights.sum(-1, keepdim=True)
    if rule.sinks_A is not None:
        total = total + rule.sinks_A.exp()[:, None, None]
    return torch.einsum("basl,bald->basd", weights / total, v)
