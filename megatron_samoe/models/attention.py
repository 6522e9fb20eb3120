"""Causal self-attention with heads split over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.norms import Norm, SplitNorm
from megatron_samoe.models.rotary import apply_rotary
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops.attention import ScoreRule, attention, needs_scores
from megatron_samoe.ops.document_attention import Documents, document_attention
from megatron_samoe.parallel_state.parameter_tag import Init, ParameterTag
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, new_parameter
from megatron_samoe.tensor_parallel.mappings import to_heads, to_sequences
from megatron_samoe.tensor_parallel.random import recompute
from megatron_samoe.tensor_parallel.ring_attention import ring_attention


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs that all layers' attention shares in one forward pass.

    Attributes:
        rotary: cos and sin tables, or None without rotary positions.
        documents: where given, no token attends to another document.
        mask_B1SS: True where a query may attend to a key, for attention from outside; None for all before it.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    documents: Documents | None = None
    mask_B1SS: Tensor | None = None


class AttentionCore(nn.Module):
    """The base of all kinds of attention: scores of queries and keys, and the weighted values.

    Args:
        recompute_core: keep only its inputs for the backward pass.
    """

    output: RowParallelLinear

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState, dtype: torch.dtype, recompute_core: bool):
        super().__init__()
        self.config, self.layer, self.tensor_rank = config, layer, state.tp.rank
        self.cp, self.uses_ring = state.cp, state.cp.size > 1 and state.cp_comm_type == "p2p"
        self.window, self.softcap = config.window_of(layer), config.attn_logit_softcapping
        self.sinks: nn.Parameter | None = None
        self.has_sinks, self.num_local_heads = (
            config.softmax_type != "vanilla",
            config.num_attention_heads // state.tp.size,
        )
        if config.softmax_type == "learnable":
            tag, wide = ParameterTag(ShardSpec(partition=((0, "tp"),))), torch.promote_types(dtype, torch.float32)
            self.sinks = new_parameter((config.num_attention_heads,), tag, state, wide)
        # Scores that are dropped are drawn again with all of the core.
        self.recompute_core = recompute_core or (config.attention_dropout > 0 and needs_scores(self.rule()))

    def rule(self, device: torch.device | None = None) -> ScoreRule:
        """Returns the parts of scores in addition to the product of queries and keys."""
        sinks: Tensor | None = self.sinks
        if sinks is None and self.has_sinks:
            sinks = torch.zeros(self.num_local_heads, device=device)
        return ScoreRule(self.window, self.softcap, sinks, self.config.attention_multiplier)

    def run_core(
        self, q_BSAD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, inputs: AttentionInputs, context: ForwardContext
    ) -> Tensor:
        """Returns `core`, recomputed in the backward pass where that is asked for."""
        arguments = (q_BSAD, k_BSGD, v_BSGD, inputs, context)
        return recompute(self.core, *arguments) if self.recompute_core and context.training else self.core(*arguments)

    def core(
        self, q_BSAD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, inputs: AttentionInputs, context: ForwardContext
    ) -> Tensor:
        """Returns attention's output [T, A * D] before its projection, from rotated queries and keys."""
        if self.cp.size > 1:
            return self._context_parallel(q_BSAD, k_BSGD, v_BSGD, inputs, context)
        rule = self.rule(q_BSAD.device)
        return self._full_sequences(q_BSAD, k_BSGD, v_BSGD, inputs, context, rule).flatten(2).flatten(0, 1)

    def _context_parallel(
        self, q_BSAD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, inputs: AttentionInputs, context: ForwardContext
    ) -> Tensor:
        """As `core` under context parallelism: inputs are this rank's part of each sequence.

        With ring attention (p2p) keys and values travel; else an all-to-all gives each rank complete sequences of some heads.
        """
        rule, cp = self.rule(q_BSAD.device), self.cp
        if inputs.mask_B1SS is not None:
            raise ConfigError(
                "--context-parallel-size", cp.size, "must be 1 with an attention class that sets a mask of its own"
            )
        if self.uses_ring:
            assert rule.is_plain and inputs.documents is None  # config/rules/layout.py
            query, key, value = (t.transpose(1, 2) for t in (q_BSAD, k_BSGD, v_BSGD))
            # A query that is a view keeps the fused projection alive until the backward pass; keys and values are copied to be sent.
            if query.untyped_storage().nbytes() > query.numel() * query.element_size():
                query = query.clone()
            return ring_attention(query, key, value, cp, rule.scale).transpose(1, 2).flatten(2).flatten(0, 1)
        if rule.sinks_A is not None:
            rule = replace(rule, sinks_A=rule.sinks_A.chunk(cp.size)[cp.rank])
        query, key, value = (to_heads(t, cp) for t in (q_BSAD, k_BSGD, v_BSGD))
        return to_sequences(self._full_sequences(query, key, value, inputs, context, rule), cp).flatten(2).flatten(0, 1)

    def _full_sequences(
        self,
        q_BSAD: Tensor,
        k_BSGD: Tensor,
        v_BSGD: Tensor,
        inputs: AttentionInputs,
        context: ForwardContext,
        rule: ScoreRule,
    ) -> Tensor:
        """Returns y_BSAD of complete sequences."""
        dropout = self.config.attention_dropout if context.training else 0.0
        query, key, value = (t.transpose(1, 2) for t in (q_BSAD, k_BSGD, v_BSGD))
        documents, mask = inputs.documents, inputs.mask_B1SS

        def attend() -> Tensor:
            if documents is None or mask is not None:
                within = mask if documents is None or mask is None else mask & documents.mask()
                return attention(query, key, value, rule, within, dropout)
            return document_attention(query, key, value, rule, documents, dropout)

        if dropout == 0.0:
            y_BASD = attend()
        else:
            assert context.random is not None
            devices = [query.device] if query.is_cuda else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(context.random.attention_seed(self.layer, self.tensor_rank))
                y_BASD = attend()
        return y_BASD.transpose(1, 2)


class SelfAttention(AttentionCore):
    """Fused query-key-value projection ([key-value heads, queries per head + 2, D, H]), SDPA, output projection."""

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState, dtype: torch.dtype, recompute_core: bool):
        super().__init__(config, layer, state, dtype, recompute_core)
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_kv_heads, config.head_dim
        self.queries_per_kv = heads // kv_heads
        self.qkv = ColumnParallelLinear(
            config.hidden_size,
            (kv_heads, self.queries_per_kv + 2, head_dim),
            0,
            bias=config.qkv_bias,
            init=Init(std=config.init_method_std),
            state=state,
            dtype=dtype,
        )
        self.output = RowParallelLinear(
            heads * head_dim,
            config.hidden_size,
            bias=config.attention_output_bias,
            init=Init(std=config.output_init_std),
            state=state,
            dtype=dtype,
        )
        self.q_norm, self.k_norm = (
            _query_key_norm(config, count, state, dtype) if config.qk_layernorm else None for count in (heads, kv_heads)
        )

    def forward(self, x_TH: Tensor, inputs: AttentionInputs, context: ForwardContext) -> Tensor:
        """Returns y_TH."""
        batch, head_dim = context.batch_size, self.config.head_dim
        qkv = self.qkv(x_TH)
        qkv = qkv.view(batch, qkv.shape[0] // batch, -1, self.queries_per_kv + 2, head_dim)
        q_BSAD = qkv[:, :, :, :-2].flatten(2, 3)
        k_BSGD, v_BSGD = qkv[:, :, :, -2], qkv[:, :, :, -1]
        if self.q_norm is not None and self.k_norm is not None:
            if self.config.qk_layernorm_scope == "all":
                q_BSAD = self.q_norm(q_BSAD.flatten(2)).view_as(q_BSAD)
                k_BSGD = self.k_norm(k_BSGD.flatten(2)).view_as(k_BSGD)
            else:
                q_BSAD, k_BSGD = self.q_norm(q_BSAD), self.k_norm(k_BSGD)
        clip = self.config.clip_qkv
        if clip is not None:
            q_BSAD, k_BSGD, v_BSGD = (t.clamp(-clip, clip) for t in (q_BSAD, k_BSGD, v_BSGD))
        if inputs.rotary is not None:
            q_BSAD, k_BSGD = apply_rotary(q_BSAD, inputs.rotary), apply_rotary(k_BSGD, inputs.rotary)
        if context.cache is not None:
            q_TAD, k_TGD, v_TGD = (t.flatten(0, 1) for t in (q_BSAD, k_BSGD, v_BSGD))
            return self.output(context.cache.attend(self.layer, q_TAD, k_TGD, v_TGD, self.rule(x_TH.device)))
        return self.output(self.run_core(q_BSAD, k_BSGD, v_BSGD, inputs, context))


def _query_key_norm(config: ModelConfig, num_heads: int, state: ParallelState, dtype: torch.dtype) -> Norm | SplitNorm:
    if config.qk_layernorm_scope == "all":
        return SplitNorm(config, num_heads * config.head_dim, state, dtype)
    return Norm(config, config.head_dim, state, dtype, split_input=True)
