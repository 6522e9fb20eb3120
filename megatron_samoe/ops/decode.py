"""Layers over a few tokens for decoding, which read each weight (fp32, bf16 or int8) once.

Activations are fp32 and flat, [T, H], whatever the weights are. With the compiled extension each block is one call that
streams the weights from memory: on a CPU, and on CUDA where its kernels are asked for. Otherwise the references of
ops/decode_reference.py do the same in torch, on any device. Compiled, a token's results have the same bits whatever
other tokens share the call.

Letters as in CONTRIBUTING.md, and Q: queries per key-value head; M: matrices of a stack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.ops import decode_reference, extension
from megatron_samoe.ops.decode_parts import (
    WEIGHT_DTYPES,
    AttentionLayer,
    ExpertStack,
    Norm,
    Places,
    Routing,
    Weight,
    WeightType,
)


def stored(weight: Tensor, kind: WeightType) -> Weight:
    """Returns a weight of the given kind for inference; the tensor itself where nothing changes."""
    if kind != "int8":
        return Weight(weight.detach().to(WEIGHT_DTYPES[kind]).contiguous())
    source = weight.detach().contiguous()
    if source.dtype == torch.float16:
        source = source.float()
    made = Weight(torch.empty_like(source, dtype=torch.int8), source.new_empty(source.shape[:-1], dtype=torch.float32))
    # Torch's ops would need several tensors of fp32 in between, whose fresh memory costs more than the arithmetic.
    combine_rows([Weight(source)], torch.ones(1, device=source.device), made)
    return made


def linear(x_TK: Tensor, weight: Weight, bias: Tensor | None, out_TN: Tensor, accumulate: bool = False) -> Tensor:
    """Writes x w^T + bias to out, or adds it, and returns out.

    Args:
        weight: [.., K] with N rows in all.
    """
    if extension.serves(x_TK, cuda="decoding"):
        torch.ops.megatron_samoe.decode_linear(x_TK, *weight.arguments(), bias, out_TN, accumulate)
        return out_TN
    y_TN = decode_reference.linear(x_TK, weight, bias)
    return out_TN.add_(y_TN) if accumulate else out_TN.copy_(y_TN)


def norm(x_TH: Tensor, parameters: Norm, out_TH: Tensor) -> Tensor:
    """Writes the normalised rows to out and returns it."""
    if extension.serves(x_TH, cuda="decoding"):
        torch.ops.megatron_samoe.decode_norm(x_TH, *parameters.arguments(), out_TH)
        return out_TH
    return out_TH.copy_(decode_reference.norm(x_TH, parameters))


def attention_block(x_TH: Tensor, layer: AttentionLayer, places: Places, scratch: Tensor) -> None:
    """Adds attention over the cache to the residual stream x, in place, and stores the tokens' keys and values.

    Args:
        scratch: fp32, `attention_scratch` elements or more.
    """
    if not (extension.serves(x_TH, cuda="decoding") and layer.is_plain):
        y_TF = decode_reference.attention(x_TH, layer, places)
        x_TH += decode_reference.linear(y_TF, layer.output, layer.output_bias)
        return
    cache = (*places.arguments(), layer.keys, layer.values)
    qkv, output = (*layer.qkv.arguments(), layer.qkv_bias), (*layer.output.arguments(), layer.output_bias)
    norms = layer.head_norm_tensors()
    torch.ops.megatron_samoe.decode_attention_block(
        x_TH, *layer.norm.arguments(), *qkv, norms, *cache, *output, scratch
    )


def attention_scratch(num_tokens: int, layer: AttentionLayer) -> int:
    """Returns the number of floats that `attention_block` needs. On CUDA, more of them let parts of long sequences run
    side by side.
    """
    heads, queries, head_dim, hidden = layer.qkv.data.shape
    width = heads * queries * head_dim
    return num_tokens * (hidden + 3 * width) + 64


def mlp_block(x_TH: Tensor, norm_of_x: Norm, routing: Routing | None, experts: ExpertStack, scratch: Tensor) -> None:
    """Adds an MLP to the residual stream x, in place: the chosen experts', or without routing the only expert's.

    Args:
        scratch: fp32, `mlp_scratch` elements or more.
    """
    assert routing is None or routing.mixing is None
    if extension.serves(x_TH, cuda="decoding") and (routing is None or routing.is_plain):
        router = (
            (None, 1, False, False)
            if routing is None
            else (routing.weight_EH, routing.topk, routing.rule.score_function == "sigmoid", routing.rule.pre_softmax)
        )
        torch.ops.megatron_samoe.decode_moe_block(x_TH, *norm_of_x.arguments(), *router, *experts.arguments(), scratch)
        return
    topk = 1 if routing is None else routing.topk
    ids_TK = x_TH.new_empty(x_TH.shape[0], topk, dtype=torch.int64)
    routed = Routed(torch.empty_like(x_TH), ids_TK, x_TH.new_empty(ids_TK.shape))
    route(x_TH, norm_of_x, routing, routed, scratch)
    experts_block(routed, experts, x_TH.new_empty(*ids_TK.shape, x_TH.shape[1]), x_TH, scratch)


def mlp_scratch(num_tokens: int, hidden: int, ffn: int, topk: int, num_experts: int) -> int:
    """Returns the number of floats that `mlp_block`, `route` and `experts_block` need."""
    # On CUDA the router's sums and the order of slots by expert lie here too.
    return num_tokens * (2 * hidden + topk * (ffn + hidden + 5) + 2 * num_experts + 4) + 8 * num_experts + 256


@dataclass(frozen=True)
class Routed:
    """A router's result.

    Attributes:
        normed_TH: the normalised tokens.
        ids_TK: the chosen experts, int64; -1 where a token has fewer.
        probs_TK: their weights.
        shared_T: weight of the shared MLP, where it has one.
    """

    normed_TH: Tensor
    ids_TK: Tensor
    probs_TK: Tensor
    shared_T: Tensor | None = None


def route(x_TH: Tensor, norm_of_x: Norm, routing: Routing | None, out: Routed, scratch: Tensor) -> None:
    """Writes the normalised tokens and their experts to out. Without routing all tokens take expert 0 with weight 1."""
    r = routing
    if r is None:
        norm(x_TH, norm_of_x, out.normed_TH)
        out.ids_TK.zero_()
        out.probs_TK.fill_(1.0)
        return
    if extension.serves(x_TH, cuda="decoding" if r.is_plain else None):
        shared_T = None if r.mixing is None else out.shared_T
        results = (out.normed_TH, out.ids_TK, out.probs_TK, shared_T)
        torch.ops.megatron_samoe.decode_route(x_TH, *norm_of_x.arguments(), *r.arguments(), *results, scratch)
    else:
        norm(x_TH, norm_of_x, out.normed_TH)
        ids_TK, probs_TK, shared_T = decode_reference.choose(out.normed_TH, r)
        out.ids_TK.copy_(ids_TK)
        out.probs_TK.copy_(probs_TK)
        if shared_T is not None:
            assert out.shared_T is not None
            out.shared_T.copy_(shared_T)
    if r.shared_gate_1H is not None:
        assert out.shared_T is not None
        torch.sigmoid(out.normed_TH @ r.shared_gate_1H[0], out=out.shared_T)


def experts_block(
    routed: Routed, experts: ExpertStack, y_TKH: Tensor, out_TH: Tensor, scratch: Tensor, combine: bool = True
) -> None:
    """Writes to y the results of the chosen experts that the stack has, and then adds their sum to out.

    Args:
        combine: False leaves out unchanged. Results of experts that the stack lacks stay in y as they were, so a stack
            can hold some experts at a time.
    """
    r = routed
    if extension.serves(out_TH, cuda="decoding"):
        given = (r.normed_TH, r.ids_TK, r.probs_TK, *experts.arguments())
        torch.ops.megatron_samoe.decode_experts(*given, y_TKH, combine, out_TH, scratch)
        return
    decode_reference.experts(r.normed_TH, r.ids_TK, experts, y_TKH)
    if combine:
        y_TKH.masked_fill_((r.ids_TK < 0)[..., None], 0.0)
        out_TH += (y_TKH * r.probs_TK[..., None]).sum(1)


def combine_rows(banks: list[Weight], coefficients_P: Tensor, out: Weight) -> None:
    """Writes the weighted sum of equally shaped matrices to out, in out's type. A bank with coefficient 0 is not read."""
    if extension.serves(out.scale if out.data.dtype == torch.int8 else out.data, cuda="decoding"):
        torch.ops.megatron_samoe.combine_rows(
            [bank.data for bank in banks], [bank.scale for bank in banks], coefficients_P, out.data, out.scale
        )
        return
    decode_reference.combine_rows(banks, coefficients_P.tolist(), out)
