"""A whole model's decoding step on a CPU as one compiled call, over weights that were checked when the plan was made.

A step by a plan gives the same bits as the same step by the blocks of ops/decode.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_samoe.ops.decode_parts import AttentionLayer, ExpertStack, Norm, Places, Routing, Weight


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
        ops, n = torch.ops.megatron_samoe, final_norm
        self._number = ops.decode_plan(
            words.data,
            words.scale,
            positions,
            output.data,
            output.scale,
            n.weight,
            n.bias,
            n.epsilon,
            n.rms,
            cos_PR,
            sin_PR,
            x_TH,
            scratch,
            max_logits,
        )
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
        ops, a, n = torch.ops.megatron_samoe, attention, attention.norm
        ops.decode_plan_attention(
            self._number,
            n.weight,
            n.bias,
            n.epsilon,
            n.rms,
            a.qkv.data,
            a.qkv.scale,
            a.qkv_bias,
            a.head_norm_tensors(),
            a.keys,
            a.values,
            a.output.data,
            a.output.scale,
            a.output_bias,
        )
        n = mlp_norm
        router = (*[None] * 6, False, False, 0, 0, 1.0, 1) if routing is None else (*routing.arguments(), routing.topk)
        ops.decode_plan_mlp(self._number, n.weight, n.bias, n.epsilon, n.rms, *router, *_stack(experts))
        if shared is not None:
            ops.decode_plan_shared(self._number, *_stack(shared))

    def step(self, tokens_T: Tensor, places: Places, rows_N: Tensor, logits_NV: Tensor) -> None:
        """Runs a step's tokens, keeps their keys and values, and writes the logits of the tokens `rows_N`.

        Args:
            tokens_T, rows_N: int64.
            places: its rotary tables are ignored: the plan's count.
        """
        p = places
        self._step(self._number, tokens_T, p.positions_T, p.slots_T, p.pages, rows_N, logits_NV)


def _stack(e: ExpertStack) -> Sequence[Tensor | bool | None]:
    return (
        e.index1_E,
        e.index2_E,
        e.w1.data,
        e.w1.scale,
        e.b1,
        e.w2.data,
        e.w2.scale,
        e.b2,
        e.factor1_E,
        e.factor2_E,
        e.gated,
    )
