"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are made from one small vector per token.

A token's latent c has --kv-lora-rank numbers; each head makes its keys and values from it. Positions are in a part of the key
that all heads share, and in a part of each query. So a cache holds only c and that part, for all heads together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.models.attention import AttentionCore, AttentionInputs, SelfAttention
from megatron_samoe.models.norms import Norm
from megatron_samoe.models.rotary import apply_rotary
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.parameter_tag import Init
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, TokenWiseLinear
from megatron_samoe.tensor_parallel.mappings import enter_tensor_parallel_region


def configured_attention(
    config: ModelConfig, layer: int, state: ParallelState, dtype: torch.dtype, recompute_core: bool
) -> AttentionCore:
    """Returns the attention of a layer that the configuration asks for."""
    kind = LatentAttention if config.multi_latent_attention else SelfAttention
    return kind(config, layer, state, dtype, recompute_core)


class LatentAttention(AttentionCore):
    """Projections down to latents act on each token separately, and every tensor-parallel rank has all of them. Projections up to
    heads and from heads to the output are split over the ranks.
    """

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState, dtype: torch.dtype, recompute_core: bool):
        super().__init__(config, layer, state, dtype, recompute_core)
        self.state = state
        heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        init = Init(std=config.init_method_std)

        def down(size: int) -> TokenWiseLinear:
            return TokenWiseLinear(hidden, size, init=init, state=state, dtype=dtype)

        def up(size: int, channels: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(size, (heads, channels), 0, bias=False, init=init, state=state, dtype=dtype)

        self.q_down = self.q_norm = None
        if config.q_lora_rank is not None:
            self.q_down, self.q_norm = down(config.q_lora_rank), Norm(config, config.q_lora_rank, state, dtype)
        self.q_up = up(config.q_lora_rank or hidden, config.query_dim)
        self.kv_down, self.kv_norm = down(config.latent_dim), Norm(config, rank, state, dtype)
        self.kv_up = up(rank, config.qk_head_dim + config.v_head_dim)
        self.output = RowParallelLinear(
            heads * config.v_head_dim,
            hidden,
            bias=config.attention_output_bias,
            init=Init(std=config.output_init_std),
            state=state,
            dtype=dtype,
        )

    def forward(self, x_TH: Tensor, inputs: AttentionInputs, context: ForwardContext) -> Tensor:
        """Returns y_TH."""
        config, batch = self.config, context.batch_size
        latent_q = x_TH if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x_TH))
        q_TF = self.q_up(latent_q)
        q_BSAD = q_TF.view(batch, q_TF.shape[0] // batch, -1, config.query_dim)
        latent, key = self.kv_down(x_TH).split((config.kv_lora_rank, config.qk_pos_emb_head_dim), -1)
        latent = self.kv_norm(latent)
        key_BS1R = enter_tensor_parallel_region(key.contiguous(), self.state).view(*q_BSAD.shape[:2], 1, -1)
        assert inputs.rotary is not None
        plain, turned = q_BSAD.split((config.qk_head_dim, config.qk_pos_emb_head_dim), -1)
        turned, key_BS1R = apply_rotary(turned, inputs.rotary), apply_rotary(key_BS1R, inputs.rotary)
        if context.cache is not None:
            return self.output(self._cached(plain, turned, latent, key_BS1R, context))
        kv_BSAD = self.kv_up(latent).view(*q_BSAD.shape[:3], -1)
        key_part, v_BSAD = kv_BSAD.split((config.qk_head_dim, config.v_head_dim), -1)
        k_BSAD = torch.cat((key_part, key_BS1R.expand(*key_part.shape[:3], -1)), -1)
        arguments = (torch.cat((plain, turned), -1), k_BSAD, v_BSAD, inputs, context)
        return self.output(self.run_core(*arguments))

    def core(
        self, q_BSAD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, inputs: AttentionInputs, context: ForwardContext
    ) -> Tensor:
        """Returns attention's output [T, A * V] before its projection; fused kernels want values as wide as keys."""
        width = v_BSGD.shape[-1]
        y_TF = super().core(q_BSAD, k_BSGD, F.pad(v_BSGD, (0, q_BSAD.shape[-1] - width)), inputs, context)
        return y_TF.view(*y_TF.shape[:-1], -1, q_BSAD.shape[-1])[..., :width].flatten(-2)

    def _cached(
        self, plain_BSAD: Tensor, turned_BSAD: Tensor, latent: Tensor, key_BS1R: Tensor, context: ForwardContext
    ) -> Tensor:
        """Returns attention's output over cached latents. A head's key c -> W c with a query q is c with W^T q, so heads
        turn their queries instead of the cache's latents; values are latents, which heads project after attention.
        """
        assert context.cache is not None
        config = self.config
        up_AKC, down_AVC = self.kv_up.weight.split((config.qk_head_dim, config.v_head_dim), 1)
        latent_TC = enter_tensor_parallel_region(latent, self.state)
        absorbed = torch.einsum("tad,adc->tac", plain_BSAD.flatten(0, 1), up_AKC)
        q_TAD = torch.cat((absorbed, turned_BSAD.flatten(0, 1)), -1)
        if config.attention_multiplier is None:
            # Scores are over the root of a query's width, which is another one here.
            q_TAD = q_TAD * (q_TAD.shape[-1] / config.query_dim) ** 0.5
        k_T1D = torch.cat((latent_TC[:, None], key_BS1R.flatten(0, 1)), -1)
        y_TF = context.cache.attend(self.layer, q_TAD, k_T1D, latent_TC[:, None], self.rule(latent.device))
        y_TAC = y_TF.view(*q_TAD.shape[:2], -1)
        return torch.einsum("tac,avc->tav", y_TAC, down_AVC).flatten(1)
