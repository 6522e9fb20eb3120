"""Layers over a few tokens for decoding, which read each weight (fp32, bf16 or int8) once.

Activations are fp32 and flat, [T, H], whatever the weights are. With the compiled extension each block is one call that
streams the weights from memory: on a CPU, and on CUDA where its kernels are asked for. Otherwise the references of
ops/decode_reference.py do the same in torch, on any device. Compiled, a token's results have the same bits whatever
other tokens share the call.

Letters as in CONTRIBUTING.md, and Q: queries per key-value head; M: matrices of a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.ops import decode_reference, extension
from megatron_samoe.ops.attention import PLAIN, ScoreRule
from megatron_samoe.ops.topk_gate import ChoiceRule

#: Positions of one page of the key-value cache; the kernels take that many keys at once.
PAGE = 16
WeightType = Literal["fp32", "bf16", "int8"]
WEIGHT_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Weight:
    """Matrices [.., outputs, inputs] in fp32, bf16, or int8 with one fp32 scale per row: weight = data * scale."""

    data: Tensor
    scale: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Weight:
        """Returns a weight of what a function makes of the numbers and of the scales; of their leading dims alone."""
        return Weight(function(self.data), None if self.scale is None else function(self.scale))

    def dequantized(self) -> Tensor:
        """Returns the matrices in fp32."""
        return decode_reference.dequantized(self.data, self.scale)


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm (`rms`), over the last dim; fp32 weights."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float
    rms: bool


@dataclass(frozen=True)
class Places:
    """The positions of a step's tokens, and their places in the cache.

    Attributes:
        positions_T, slots_T: int32; place in the sequence, and row of `pages`.
        pages: [slots, pages of a sequence], int32.
        cos_PR, sin_PR: fp32 tables by position, or None without rotary positions.
    """

    positions_T: Tensor
    slots_T: Tensor
    pages: Tensor
    cos_PR: Tensor | None = None
    sin_PR: Tensor | None = None


@dataclass(frozen=True)
class AttentionLayer:
    """Weights and cache of one layer's attention.

    Attributes:
        qkv: [G, Q + 2, D, H].
        head_norms: none, or norms of queries and keys, of each head alone ([D]) or of all together.
        rule: what scores have besides the product of queries and keys; fp32 sinks.
        clip: c that cuts queries, keys and values to [-c, c], after their norms.
        output: [H, G * Q * D].
        keys: [pages, G, D, PAGE], and values [pages, G, PAGE, D], fp32 or bf16.
    """

    norm: Norm
    qkv: Weight
    qkv_bias: Tensor | None
    head_norms: tuple[Norm, Norm] | None
    output: Weight
    output_bias: Tensor | None
    keys: Tensor
    values: Tensor
    rule: ScoreRule = PLAIN
    clip: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is what the kernels compute."""
        head_dim = self.qkv.data.shape[2]
        plain = self.rule.is_plain and self.rule.scale is None and self.clip is None
        return plain and all(len(n.weight) == head_dim for n in self.head_norms or ())

    def head_norm_tensors(self) -> list[Tensor]:
        """Returns the norms' tensors [D] as the ops take them: none, the weights of both, or their weights and then
        biases.
        """
        if self.head_norms is None:
            return []
        q, k = self.head_norms
        return [q.weight, k.weight] + ([q.bias, k.bias] if q.bias is not None and k.bias is not None else [])


@dataclass(frozen=True)
class ExpertStack:
    """A stack of expert matrices, and the matrices that each expert uses.

    Attributes:
        w1: [M, F, H], or [M, 2, F, H] for SwiGLU; b1 [M, (2,) F].
        w2: [M, H, F]; b2 [M, H].
        index1_E, index2_E: int64, an expert's matrix in w1 (and b1) and in w2 (and b2); -1 leaves it out.
        factor1_E, factor2_E: fp32 factors on an expert's w1 (and b1) and on its w2 (and b2); all 1 if None.
    """

    w1: Weight
    w2: Weight
    b1: Tensor | None
    b2: Tensor | None
    gated: bool
    index1_E: Tensor
    index2_E: Tensor
    factor1_E: Tensor | None = None
    factor2_E: Tensor | None = None

    @property
    def is_own(self) -> bool:
        """Whether every expert e has matrix e, unscaled and in fp32."""
        own = torch.arange(self.w1.data.shape[0], device=self.index1_E.device)
        indices = torch.equal(self.index1_E, own) and torch.equal(self.index2_E, own)
        return indices and self.factor1_E is None and self.factor2_E is None and self.w1.data.dtype == torch.float32


@dataclass(frozen=True)
class Routing:
    """A router, in fp32.

    Attributes:
        norm_scale: [1], the length of a token's logits, where scores are "norm".
        mixing: none, or weight_2H and bias_2: a softmax of them weighs routed experts against the MLP beside them.
        shared_gate_1H: a sigmoid of it weighs the MLP beside them, where there is one and it is not mixed.
    """

    weight_EH: Tensor
    rule: ChoiceRule
    norm_scale: Tensor | None = None
    mixing: tuple[Tensor, Tensor] | None = None
    shared_gate_1H: Tensor | None = None

    @property
    def topk(self) -> int:
        """Experts of a token."""
        return self.rule.topk

    @property
    def is_plain(self) -> bool:
        """Whether logits decide alone, as the fused block and the CUDA kernels have it."""
        return self.rule.is_plain and self.norm_scale is None and self.mixing is None

    def arguments(self) -> tuple[Tensor | float | None, ...]:
        """Returns the router as the ops take it."""
        r, (weight_2H, bias_2) = self.rule, self.mixing or (None, None)
        return (self.weight_EH, self.norm_scale, r.bias_E, r.candidates_E, weight_2H, bias_2, r.score_function == "sigmoid", r.pre_softmax,
                r.num_groups, r.group_topk, r.factor)  # fmt: skip


def quantize(weight: Tensor) -> Weight:
    """Returns a [.., outputs, inputs] weight as int8, with a scale per row that makes the row's largest magnitude 127."""
    return Weight(*decode_reference.quantize(weight))


def stored(weight: Tensor, kind: WeightType) -> Weight:
    """Returns a weight of the given kind for inference; the tensor itself where nothing changes."""
    if kind == "int8":
        return quantize(weight)
    return Weight(weight.detach().to(WEIGHT_DTYPES[kind]).contiguous())


def linear(x_TK: Tensor, weight: Weight, bias: Tensor | None, out_TN: Tensor, accumulate: bool = False) -> Tensor:
    """Writes x w^T + bias to out, or adds it, and returns out.

    Args:
        weight: [.., K] with N rows in all.
    """
    if extension.serves(x_TK, cuda="decoding"):
        torch.ops.megatron_samoe.decode_linear(x_TK, weight.data, weight.scale, bias, out_TN, accumulate)
        return out_TN
    y_TN = decode_reference.linear(x_TK, weight.data, weight.scale, bias)
    return out_TN.add_(y_TN) if accumulate else out_TN.copy_(y_TN)


def norm(x_TH: Tensor, parameters: Norm, out_TH: Tensor) -> Tensor:
    """Writes the normalised rows to out and returns it."""
    p = parameters
    if extension.serves(x_TH, cuda="decoding"):
        torch.ops.megatron_samoe.decode_norm(x_TH, p.weight, p.bias, p.epsilon, p.rms, out_TH)
        return out_TH
    return out_TH.copy_(decode_reference.norm(x_TH, p.weight, p.bias, p.epsilon, p.rms))


def attention_block(x_TH: Tensor, layer: AttentionLayer, places: Places, scratch: Tensor) -> None:
    """Adds attention over the cache to the residual stream x, in place, and stores the tokens' keys and values.

    Args:
        scratch: fp32, `attention_scratch` elements or more.
    """
    p, n = places, layer.norm
    epsilon, rms = n.epsilon, n.rms
    if extension.serves(x_TH, cuda="decoding") and layer.is_plain:
        torch.ops.megatron_samoe.decode_attention_block(
            x_TH, n.weight, n.bias, epsilon, rms, layer.qkv.data, layer.qkv.scale, layer.qkv_bias,
            layer.head_norm_tensors(), p.cos_PR, p.sin_PR, p.positions_T, p.slots_T, p.pages, layer.keys, layer.values,
            layer.output.data, layer.output.scale, layer.output_bias, scratch,
        )  # fmt: skip
        return
    normed_TH = decode_reference.norm(x_TH, n.weight, n.bias, epsilon, rms)
    qkv = decode_reference.linear(normed_TH, layer.qkv.data, layer.qkv.scale, layer.qkv_bias)
    y_TF = decode_reference.attention(
        qkv.view(-1, *layer.qkv.data.shape[:3]), layer.head_norm_tensors(), epsilon, rms, p.cos_PR, p.sin_PR,
        p.positions_T, p.slots_T, p.pages, layer.keys, layer.values, layer.rule, layer.clip,
    )  # fmt: skip
    x_TH += decode_reference.linear(y_TF, layer.output.data, layer.output.scale, layer.output_bias)


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
    n, e = norm_of_x, experts
    assert routing is None or routing.mixing is None
    if extension.serves(x_TH, cuda="decoding") and (routing is None or routing.is_plain):
        router = (None, 1, False, False) if routing is None else (
            routing.weight_EH, routing.topk, routing.rule.score_function == "sigmoid", routing.rule.pre_softmax)  # fmt: skip
        torch.ops.megatron_samoe.decode_moe_block(
            x_TH, n.weight, n.bias, n.epsilon, n.rms, *router, e.index1_E, e.index2_E, e.w1.data, e.w1.scale, e.b1,
            e.w2.data, e.w2.scale, e.b2, e.factor1_E, e.factor2_E, e.gated, scratch,
        )  # fmt: skip
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
        shared_T: weight of the MLP beside them, where it has one.
    """

    normed_TH: Tensor
    ids_TK: Tensor
    probs_TK: Tensor
    shared_T: Tensor | None = None


def route(x_TH: Tensor, norm_of_x: Norm, routing: Routing | None, out: Routed, scratch: Tensor) -> None:
    """Writes the normalised tokens and their experts to out. Without routing all tokens take expert 0 with weight 1."""
    n, r = norm_of_x, routing
    if r is None:
        norm(x_TH, n, out.normed_TH)
        out.ids_TK.zero_()
        out.probs_TK.fill_(1.0)
        return
    if extension.serves(x_TH, cuda="decoding" if r.is_plain else None):
        torch.ops.megatron_samoe.decode_route(
            x_TH, n.weight, n.bias, n.epsilon, n.rms, *r.arguments(), out.normed_TH, out.ids_TK, out.probs_TK,
            None if r.mixing is None else out.shared_T, scratch,
        )  # fmt: skip
    else:
        norm(x_TH, n, out.normed_TH)
        ids_TK, probs_TK, shared_T = decode_reference.choose(out.normed_TH, r.weight_EH, r.rule, r.norm_scale, r.mixing)
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
    e, r = experts, routed
    if extension.serves(out_TH, cuda="decoding"):
        torch.ops.megatron_samoe.decode_experts(
            r.normed_TH, r.ids_TK, r.probs_TK, e.index1_E, e.index2_E, e.w1.data, e.w1.scale, e.b1, e.w2.data,
            e.w2.scale, e.b2, e.factor1_E, e.factor2_E, e.gated, y_TKH, combine, out_TH, scratch,
        )  # fmt: skip
        return
    decode_reference.experts(
        r.normed_TH, r.ids_TK, e.index1_E, e.index2_E, e.w1.data, e.w1.scale, e.b1, e.w2.data, e.w2.scale, e.b2,
        e.factor1_E, e.factor2_E, e.gated, y_TKH,
    )  # fmt: skip
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
    used = [(bank.dequantized(), c) for bank, c in zip(banks, coefficients_P.tolist(), strict=True) if c != 0.0]
    decode_reference.combine_rows([bank for bank, _ in used], [c for _, c in used], out.data, out.scale)
