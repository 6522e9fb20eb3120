"""Reference implementations of the ops of ops/decode.py in plain torch: the specification, the fallback and the oracle of their tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.ops import reference
from megatron_samoe.ops.attention import attention as windowed_attention
from megatron_samoe.ops.decode_parts import AttentionLayer, ExpertStack, Norm, Places, Routing, Weight
from megatron_samoe.ops.topk_gate import limited, relu_gate


def quantize(weight: Tensor) -> Weight:
    """Returns int8 data [.., outputs, inputs] and fp32 scales [.., outputs]; a row's largest magnitude becomes 127.

    The scale of a row with a number that is not finite is NaN.
    """
    weight = weight.detach().float()
    peak = weight.abs().amax(-1)
    # torch computes 127.0 / peak by peak's reciprocal, which rounds twice.
    inverse = torch.where(peak > 0, torch.full_like(peak, 127.0) / peak, torch.zeros_like(peak))
    return Weight((weight * inverse[..., None]).round_().to(torch.int8), peak / 127.0 + peak * 0.0)


def linear(x_TK: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Returns x w^T + bias, [T, N]; row scales are applied to the sums."""
    y_TN = x_TK @ weight.data.reshape(-1, weight.data.shape[-1]).float().t()
    if weight.scale is not None:
        y_TN = y_TN * weight.scale.flatten()
    return y_TN if bias is None else y_TN + bias.flatten()


def norm(x: Tensor, n: Norm) -> Tensor:
    """Returns x normalised over its last dim."""
    if n.rms:
        y = F.rms_norm(x, n.weight.shape, n.weight, n.epsilon)
        return y if n.bias is None else y + n.bias
    return F.layer_norm(x, n.weight.shape, n.weight, n.bias, n.epsilon)


def rotate(x_TAD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Returns heads with their first R channels rotated; the first half is paired with the second."""
    rotated = cos_TR.shape[-1]
    turn, rest = x_TAD[..., :rotated], x_TAD[..., rotated:]
    first, second = turn.chunk(2, -1)
    turned = turn * cos_TR[:, None] + torch.cat((-second, first), -1) * sin_TR[:, None]
    return torch.cat((turned, rest), -1)


def attention(x_TH: Tensor, layer: AttentionLayer, places: Places) -> Tensor:
    """Stores keys and values of the tokens, and returns attention's result before its output product, [T, G * Q * D].

    With scores that are not plain, a sequence's tokens follow each other.
    """
    qkv = linear(norm(x_TH, layer.norm), layer.qkv, layer.qkv_bias).view(-1, *layer.qkv.data.shape[:3])
    num_groups, rule, pages = qkv.shape[1], layer.rule, places.pages
    q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    if layer.head_norms is not None:  # of each head ([D]), or over all heads together
        q, k = (
            norm(t.reshape(*t.shape[:-2], -1, len(n.weight)), n).view_as(t)
            for t, n in zip((q, k), layer.head_norms, strict=True)
        )
    if layer.clip is not None:
        q, k, v = (t.clamp(-layer.clip, layer.clip) for t in (q, k, v))
    positions, slots = places.positions_T.long(), places.slots_T.long()
    if places.cos_PR is not None and places.sin_PR is not None:
        cos_TR, sin_TR = places.cos_PR[positions], places.sin_PR[positions]
        q, k = rotate(q, cos_TR, sin_TR), rotate(k, cos_TR, sin_TR)
    keys, values = layer.keys, layer.values
    size = keys.shape[-1]
    page_T, offset_T = pages[slots, positions // size].long(), positions % size
    keys[page_T, :, :, offset_T] = k.to(keys.dtype)
    values[page_T, :, offset_T] = v.to(values.dtype)
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


def choose(x_TH: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns ids_TK and probs_TK of a router, and the weight of the shared MLP where it is mixed."""
    rule = routing.rule
    logits_TE = x_TH @ routing.weight_EH.t()
    if routing.norm_scale is not None:
        logits_TE = routing.norm_scale * F.normalize(logits_TE, dim=1)
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
    if routing.mixing is None:
        return ids_TK, probs_TK, None
    c_T2 = F.linear(x_TH, *routing.mixing).softmax(-1)
    return ids_TK, probs_TK * c_T2[:, :1], c_T2[:, 1]


def experts(x_TH: Tensor, ids_TK: Tensor, stack: ExpertStack, y_TKH: Tensor) -> None:
    """Writes the MLP of expert ids[t, k], applied to token t, to y[t, k] where the expert has an index."""

    def product(x: Tensor, weight: Weight, bias: Tensor | None, index: int, factor: Tensor | float) -> Tensor:
        return linear(x, weight.map(lambda t: t[index]), None if bias is None else bias[index]) * factor

    ones_E = torch.ones(len(stack.index1_E), device=x_TH.device)
    factor1_E = ones_E if stack.factor1_E is None else stack.factor1_E
    factor2_E = ones_E if stack.factor2_E is None else stack.factor2_E
    for e in ids_TK[ids_TK >= 0].unique().tolist():
        i, j = int(stack.index1_E[e]), int(stack.index2_E[e])
        if i < 0:
            continue
        token, k = (ids_TK == e).nonzero(as_tuple=True)
        h = product(x_TH[token], stack.w1, stack.b1, i, factor1_E[e])
        if stack.gated:
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h, approximate="tanh")
        y_TKH[token, k] = product(h, stack.w2, stack.b2, j, factor2_E[e])


def combine_rows(banks: list[Weight], coefficients: list[float], out: Weight) -> None:
    """Writes the weighted sum of matrices, bank after bank, to out; int8 with fresh scales. A bank with 0 is not read."""
    total = torch.zeros(out.data.shape, dtype=torch.float32, device=out.data.device)
    for bank, coefficient in zip(banks, coefficients, strict=True):
        if coefficient != 0.0:
            total += bank.dequantized() * coefficient
    if out.scale is None:
        out.data.copy_(total)
        return
    made = quantize(total)
    assert made.scale is not None
    out.data.copy_(made.data)
    out.scale.copy_(made.scale)
