"""The parts of a decoded layer, as ops/decode.py takes them: weights, norms, attention, experts and how they are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_samoe.ops.attention import PLAIN, ScoreRule
from megatron_samoe.ops.topk_gate import ChoiceRule

#: Positions of one page of the key-value cache; the kernels take that many keys at once.
PAGE = 16
WeightType = Literal["fp32", "bf16", "int8"]
_Maybe = Tensor | None
#: Indices, w1 with its scale and bias, w2 likewise, factors, and whether it is gated.
StackArguments = tuple[Tensor, Tensor, Tensor, _Maybe, _Maybe, Tensor, _Maybe, _Maybe, _Maybe, _Maybe, bool]
WEIGHT_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Weight:
    """Matrices [.., outputs, inputs] in fp32, bf16, or int8 with one fp32 scale per row: weight = data * scale."""

    data: Tensor
    scale: Tensor | None = None

    def arguments(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight as the ops take it; so do the methods of this name below."""
        return self.data, self.scale

    @property
    def num_bytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Weight:
        """Returns a weight of what a function makes of the numbers and of the scales; of their leading dims only."""
        return Weight(function(self.data), None if self.scale is None else function(self.scale))

    def dequantized(self) -> Tensor:
        """Returns the matrices in fp32."""
        return self.data.float() if self.scale is None else self.data.float() * self.scale[..., None]


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm (`rms`), over the last dim; fp32 weights."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float
    rms: bool

    def arguments(self) -> tuple[Tensor, Tensor | None, float, bool]:
        """Returns the norm."""
        return self.weight, self.bias, self.epsilon, self.rms


@dataclass(frozen=True)
class Places:
    """The positions of a step's tokens, and their rows in the cache.

    Attributes:
        positions_T, slots_T: int32; position in the sequence, and row of `pages`.
        pages: [slots, pages of a sequence], int32.
        cos_PR, sin_PR: fp32 tables by position, or None without rotary positions.
    """

    positions_T: Tensor
    slots_T: Tensor
    pages: Tensor
    cos_PR: Tensor | None = None
    sin_PR: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
        """Returns the tensors, rotary tables first."""
        return self.cos_PR, self.sin_PR, self.positions_T, self.slots_T, self.pages


@dataclass(frozen=True)
class AttentionLayer:
    """Weights and cache of one layer's attention.

    Attributes:
        qkv: [G, Q + 2, D, H].
        head_norms: none, or norms of queries and keys, of each head ([D]) or of all together.
        rule: parts of scores in addition to the product of queries and keys; fp32 sinks.
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

    def arguments(self) -> StackArguments:
        """Returns the stack."""
        first, second = (*self.w1.arguments(), self.b1), (*self.w2.arguments(), self.b2)
        return self.index1_E, self.index2_E, *first, *second, self.factor1_E, self.factor2_E, self.gated

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
        mixing: none, or weight_2H and bias_2: a softmax of them weighs routed experts against the shared MLP.
        shared_gate_1H: a sigmoid of it weighs the shared MLP, if there is one and it is not mixed.
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
        """Whether only logits decide, as in the fused block and the CUDA kernels."""
        return self.rule.is_plain and self.norm_scale is None and self.mixing is None

    def arguments(self) -> tuple[Any, ...]:
        """Returns the router."""
        r, (weight_2H, bias_2) = self.rule, self.mixing or (None, None)
        return (
            self.weight_EH,
            self.norm_scale,
            r.bias_E,
            r.candidates_E,
            weight_2H,
            bias_2,
            r.score_function == "sigmoid",
            r.pre_softmax,
            r.num_groups,
            r.group_topk,
            r.factor,
        )
