"""A full model's decoding step on a CPU as one compiled call, over weights that were checked when the plan was made.

A step by a plan gives the same bits as the same step by the blocks of ops/decode.py.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from megatron_samoe.ops.decode_parts import AttentionLayer, ExpertStack, Norm, Places, Routing, Weight

#: `Routing.arguments()` and top-k of a layer without a router: six tensors, and what no choice depends on.
_NO_ROUTER = (*[None] * 6, False, False, 0, 0, 1.0, 1)


class DecodePlan:
    """A plan of a model's steps: layers are added in order, then every step is one call, which allocates nothing.

    A plan keeps its tensors. Their values may change; the next step reads them.

    Args:
        words: [V, H]; output: [V, H]; positions: fp32 [positions, H], or None.
        cos_PR, sin_PR: rotary tables by position, or None.
        x_TH: buffer for the residual stream of the most tokens that a step may have.
        scratch: fp32 buffer for those tokens, as large as `attention_scratch` and `mlp_scratch` say.
        max_logits: most tokens of a step whose logits are wanted.

    Raises:
        RuntimeError: tensors that do not fit each other, or in a step its tokens.
    """

    def __init__(
        self,
        words: Weight,
        positions: Tensor | None,
        output: Weight,
        final_norm: Norm,
        cos_PR: Tensor | None,
        sin_PR: Tensor | None,
        x_TH: Tensor,
        scratch: Tensor,
        max_logits: int,
    ):
        ops = torch.ops.megatron_samoe
        ends = (*words.arguments(), positions, *output.arguments(), *final_norm.arguments())
        self._number = ops.decode_plan(*ends, cos_PR, sin_PR, x_TH, scratch, max_logits)
        weakref.finalize(self, ops.decode_plan_close, self._number).atexit = False
        self._step = ops.decode_plan_step.default

    def add_layer(
        self,
        attention: AttentionLayer,
        mlp_norm: Norm,
        routing: Routing | None,
        experts: ExpertStack,
        shared: ExpertStack | None,
    ) -> None:
        """Adds a layer: attention, the MLP of chosen experts (without routing, of the only one), and a shared expert if
        given.
        """
        ops, a = torch.ops.megatron_samoe, attention
        before = (*a.norm.arguments(), *a.qkv.arguments(), a.qkv_bias, a.head_norm_tensors())
        ops.decode_plan_attention(self._number, *before, a.keys, a.values, *a.output.arguments(), a.output_bias)
        router = _NO_ROUTER if routing is None else (*routing.arguments(), routing.topk)
        ops.decode_plan_mlp(self._number, *mlp_norm.arguments(), *router, *experts.arguments())
        if shared is not None:
            ops.decode_plan_shared(self._number, *shared.arguments())

    def step(self, tokens_T: Tensor, places: Places, rows_N: Tensor, logits_NV: Tensor) -> None:
        """Runs a step's tokens, keeps their keys and values, and writes the logits of the tokens `rows_N`.

        Args:
            tokens_T, rows_N: int64.
            places: its rotary tables are ignored: the plan's count.
        """
        p = places
        self._step(self._number, tokens_T, p.positions_T, p.slots_T, p.pages, rows_N, logits_NV)
