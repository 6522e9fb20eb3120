"""One layer, or a stage's ends, run forwards and backwards without storage: operations, and what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.models.attention import AttentionInputs
from megatron_samoe.models.gpt_stage import GPTStage
from megatron_samoe.models.rotary import rotary_tables
from megatron_samoe.models.transformer_layer import TransformerLayer
from megatron_samoe.moe.sharing.own import OwnExperts, OwnLender
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.planning.recorder import Operation, recording
from megatron_samoe.tensor_parallel.random import SampleRandom


@dataclass(frozen=True)
class Trace:
    """A micro-batch's pass through one layer, or one end of a stage, on one rank.

    Attributes:
        forward, backward: operations. The backward pass has those of what it computes again by itself (attention's core with
            selective recomputation); a layer that is fully recomputed has its forward pass once more.
        kept_bytes: what autograd keeps between them; a layer's input is part of it.
        forward_peak, backward_peak: most bytes during each, what is kept included.
    """

    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    kept_bytes: int
    forward_peak: int
    backward_peak: int

    @cached_property
    def forward_flops(self) -> float:
        """Multiply-adds x 2 of the forward pass."""
        return sum(operation.flops for operation in self.forward)

    @cached_property
    def core_flops(self) -> float:
        """The part of `forward_flops` in products of queries, keys and values."""
        return sum(operation.flops for operation in self.forward if operation.kind == "attention")


class _Noise(SampleRandom):
    """Draws without numbers."""

    def uniform_like(self, x_TH: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x_TH, dtype=torch.float32)


def trace_layer(layer: TransformerLayer, model: ModelConfig, batch: int, visited: float) -> Trace:
    """Returns the trace of a layer on "meta" for a micro-batch of sequences. Experts are lent as if they were the layer's own;
    all have equally many rows.

    Args:
        visited: experts that a token visits.
    """
    state = layer.state
    length = model.seq_length // state.cp.size
    rotary = None
    if model.position_embedding_type == "rope":
        rotary = rotary_tables(model, torch.empty(batch, length, device="meta"), layer.dtype)
    rows, lender = 0, OwnLender({})
    if layer.is_moe:
        moe = layer.moe
        tokens = batch * length // (1 if state.etp.size == state.tp.size else state.tp.size)
        rows = int(tokens * visited)
        lender = OwnLender({moe.moe_index: _with_main_grads(OwnExperts(moe.shape, state, layer.dtype))})
    noise = _Noise(0, 0, tuple(range(batch)))
    context = ForwardContext(batch, training=True, tokens_per_step=batch * length, random=noise)
    local_tokens = batch * length // (state.tp.size if state.sequence_parallel else 1)

    def run(x_TH: Tensor) -> Tensor:
        y_TH, *_ = layer(x_TH, AttentionInputs(rotary), context, lender)
        return y_TH

    return _trace(layer, run, (local_tokens, model.hidden_size), layer.dtype, rows, model.window_of(layer.index))


def trace_head(head: GPTStage, batch: int, fuses_loss: bool) -> Trace:
    """Returns the trace of the output layer and the loss, of a last stage without layers, for a micro-batch of sequences.

    Args:
        fuses_loss: the loss makes logits, of some tokens at a time.
    """
    model, state = head.config.model, head.state
    length = model.seq_length // state.cp.size
    labels_BS = torch.empty(batch, length, dtype=torch.int64, device="meta")
    context = ForwardContext(batch, fuses_loss=fuses_loss)

    def run(x_TH: Tensor) -> Tensor:
        y, _ = head(x_TH, context, OwnLender({}))
        return head.loss(y, labels_BS, fuses_loss)

    local_tokens = batch * length // (state.tp.size if state.sequence_parallel else 1)
    return _trace(head, run, (local_tokens, model.hidden_size), head.final_norm.weight.dtype)


def _with_main_grads(module: OwnExperts) -> OwnExperts:
    for p in module.parameters():
        p.main_grad = torch.empty_like(p, dtype=torch.float32)  # type: ignore[attr-defined]
    return module


def _trace(
    module: nn.Module,
    run: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: int = 0,
    window: int | None = None,
) -> Trace:
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in module.parameters() if p.requires_grad]
    with torch.enable_grad(), recording(rows, window) as recorder:
        y = run(torch.empty(shape, dtype=dtype, device="meta", requires_grad=True))
        forward_peak = recorder.peak
        kept = recorder.alive_bytes() - y.untyped_storage().nbytes()
        forward = recorder.take()
        edge, dy = get_gradient_edge(y), torch.empty_like(y)
        del y  # the next layer kept it, and has passed
        torch.autograd.backward([edge], [dy])  # of a tensor, it would run without this mode of functions
        backward_peak = recorder.peak
        backward = recorder.take()
        del edge, dy
        kept -= recorder.alive_bytes()  # what stays is cached for the next pass
    for hook in hooks:
        hook.remove()
    return Trace(forward, backward, kept, forward_peak, backward_peak)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
