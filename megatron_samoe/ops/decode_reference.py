"""Reference implementations of the ops of ops/decode.py in plain torch: the specification, the fallback and the oracle of their tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.ops import reference
from megatron_samoe.ops.attention import PLAIN, ScoreRule
from megatron_samoe.ops.attention import attention as windowed_attention
from megatron_samoe.ops.topk_gate import ChoiceRule, limited, relu_gate


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 data [.., outputs, inputs] and fp32 scales [.., outputs]; a row's largest magnitude becomes 127."""
    weight = weight.detach().float()
    peak = weight.abs().amax(-1)
    inverse = torch.where(peak > 0, 127.0 / peak, torch.zeros_like(peak))
    return (weight * inverse[..., None]).round_().to(torch.int8), peak / 127.0


def dequantized(data: Tensor, scale: Tensor | None) -> Tensor:
    """Returns fp32 weights [.., outputs, inputs]."""
    return data.float() if scale is None else data.float() * scale[..., None]


def linear(x_TK: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Returns x w^T + bias, [T, N]; row scales are applied to the sums."""
    y_TN = x_TK @ data.reshape(-1, data.shape[-1]).float().t()
    if scale is not None:
        y_TN = y_TN * scale.flatten()
    return y_TN if bias is None else y_TN + bias.flatten()


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, rms: bool) -> Tensor:
    """Returns x normalised over its last dim."""
    if rms:
        y = F.rms_norm(x, weight.shape, weight, epsilon)
        return y if bias is None else y + bias
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def rotate(x_TAD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Returns heads with their first R channels rotated; the first half is paired with the second."""
    rotated = cos_TR.shape[-1]
    turn, rest = x_TAD[..., :rotated], x_TAD[..., rotated:]
    first, second = turn.chunk(2, -1)
    turned = turn * cos_TR[:, None] + torch.cat((-second, first), -1) * sin_TR[:, None]
    return torch.cat((turned, rest), -1)


def attention(
    qkv: Tensor,
    head_norms: list[Tensor],
    epsilon: float,
    rms: bool,
    cos_PR: Tensor | None,
    sin_PR: Tensor | None,
    positions_T: Tensor,
    slots_T: Tensor,
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: ScoreRule = PLAIN,
    clip: float | None = None,
) -> Tensor:
    """Stores keys and values of [T, G, Q + 2, D] and returns attention's result, [T, G * Q * D].

    Args:
        head_norms: weights [D] of each head's queries and keys, and maybe their biases; or [A * D] and [G * D] over all heads.
        rule: further parts of scores; a sequence's tokens then follow each other.
    """
    num_groups = qkv.shape[1]
    q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    if head_norms:
        biases: list[Tensor | None] = [*head_norms[2:]] or [None, None]
        q, k = (
            norm(t.reshape(*t.shape[:-2], -1, len(weight)), weight, bias, epsilon, rms).view_as(t)
            for t, weight, bias in zip((q, k), head_norms, biases, strict=False)
        )
    if clip is not None:
        q, k, v = (t.clamp(-clip, clip) for t in (q, k, v))
    positions, slots = positions_T.long(), slots_T.long()
    if cos_PR is not None and sin_PR is not None:
        q, k = rotate(q, cos_PR[positions], sin_PR[positions]), rotate(k, cos_PR[positions], sin_PR[positions])
    size = keys.shape[-1]
    page_T, place_T = pages[slots, positions // size].long(), positions % size
    keys[page_T, :, :, place_T] = k.to(keys.dtype)
    values[page_T, :, place_T] = v.to(values.dtype)
    y = torch.empty_like(q)
    for slot in slots.unique().tolist():
        rows = (slots == slot).nonzero()[:, 0]
        length = int(positions[rows].max()) + 1
        low = rule.first_key(int(positions[rows].min())) // size * size
        own = pages[slot, low // size : -(-length // size)].long()
        k_LGD = keys[own].permute(0, 3, 1, 2).flatten(0, 1)[: length - low].float()
        v_LGD = values[own].transpose(1, 2).flatten(0, 1)[: length - low].float()
        query, key, value = (t.transpose(0, 1)[None] for t in (q[rows], k_LGD, v_LGD))
        if rule.is_plain:
            visible = torch.arange(length, device=q.device) <= positions[rows][:, None]
            result = F.scaled_dot_product_attention(
                query, key, value, attn_mask=visible, enable_gqa=q.shape[1] != num_groups, scale=rule.scale
            )
        else:
            result = windowed_attention(query, key, value, rule)
        y[rows] = result[0].transpose(0, 1)
    return y.flatten(1)


def choose(
    x_TH: Tensor,
    weight_EH: Tensor,
    rule: ChoiceRule,
    norm_scale: Tensor | None = None,
    mixing: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns ids_TK and probs_TK of a router, and the weight of the shared MLP; see `ops.decode_parts.Routing`."""
    logits_TE = x_TH @ weight_EH.t()
    if norm_scale is not None:
        logits_TE = norm_scale * F.normalize(logits_TE, dim=1)
    if rule.candidates_E is not None:
        logits_TE = limited(logits_TE, rule.candidates_E, multiplies=rule.score_function == "norm")
    key_TE = rule.key(logits_TE)
    if rule.score_function == "norm":
        gate = relu_gate(logits_TE, rule.topk, 1, key_TE)
        probs_TK, ids_TK = gate.probs_TK, gate.ids_TK
    else:
        sigmoid = rule.score_function == "sigmoid"
        probs_TK, ids_TK, *_ = reference.topk_gate(logits_TE, rule.topk, sigmoid, rule.pre_softmax, 1, key_TE)
    probs_TK = probs_TK * rule.factor
    if mixing is None:
        return ids_TK, probs_TK, None
    c_T2 = F.linear(x_TH, *mixing).softmax(-1)
    return ids_TK, probs_TK * c_T2[:, :1], c_T2[:, 1]


def experts(
    x_TH: Tensor,
    ids_TK: Tensor,
    index1_E: Tensor,
    index2_E: Tensor,
    w1: Tensor,
    scale1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    scale2: Tensor | None,
    b2: Tensor | None,
    factor1_E: Tensor | None,
    factor2_E: Tensor | None,
    gated: bool,
    y_TKH: Tensor,
) -> None:
    """Writes the MLP of expert ids[t, k], applied to token t, to y[t, k] where the expert has an index."""

    def part(stack: Tensor | None, index: int) -> Tensor | None:
        return None if stack is None else stack[index]

    for e in ids_TK[ids_TK >= 0].unique().tolist():
        i, j = int(index1_E[e]), int(index2_E[e])
        if i < 0:
            continue
        token, k = (ids_TK == e).nonzero(as_tuple=True)
        h = linear(x_TH[token], w1[i], part(scale1, i), part(b1, i))
        if factor1_E is not None:
            h = h * factor1_E[e]
        if gated:
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h, approximate="tanh")
        y = linear(h, w2[j], part(scale2, j), part(b2, j))
        y_TKH[token, k] = y if factor2_E is None else y * factor2_E[e]


def combine_rows(banks: list[Tensor], coefficients: list[float], out: Tensor, out_scale: Tensor | None) -> None:
    """Writes the weighted sum of fp32 matrices, bank after bank, to out; int8 with fresh scales."""
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for bank, coefficient in zip(banks, coefficients, strict=True):
        total += bank * coefficient
    if out_scale is None:
        out.copy_(total)
        return
    data, scale = quantize(total)
    out.copy_(data)
    out_scale.copy_(scale)
