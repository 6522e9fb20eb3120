"""Latent attention against transformers' DeepSeek-V3, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_samoe.config import ModelConfig
from megatron_samoe.models.attention import AttentionInputs
from megatron_samoe.models.latent_attention import LatentAttention
from megatron_samoe.models.rotary import rotary_tables
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import single_process_state
from tests.parity.hf_models import transformers

pytestmark = pytest.mark.parity

B, S, H, A = 2, 9, 24, 3
SIZES: dict[str, Any] = {"kv_lora_rank": 10, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 5}


@pytest.mark.parametrize("q_rank", [None, 7])
def test_outputs_and_gradients_are_those_of_transformers(q_rank: int | None) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    config = transformers.DeepseekV3Config(
        hidden_size=H, num_attention_heads=A, num_key_value_heads=A, q_lora_rank=q_rank, kv_lora_rank=10, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=5, rope_interleave=False, attn_implementation="eager", max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    theirs = DeepseekV3Attention(config, 0).double()
    model = ModelConfig(
        hidden_size=H, num_attention_heads=A, num_layers=1, seq_length=S, position_embedding_type="rope", normalization="RMSNorm",
        norm_epsilon=1e-6, disable_bias_linear=True, multi_latent_attention=True, q_lora_rank=q_rank, **SIZES,
    )  # fmt: skip
    ours = LatentAttention(model, 0, single_process_state(), torch.float64, recompute_core=False)
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5
    pairs = {
        "kv_down.weight": theirs.kv_a_proj_with_mqa, "kv_norm.weight": theirs.kv_a_layernorm, "kv_up.weight": theirs.kv_b_proj,
        "output.weight": theirs.o_proj,
        **({"q_up.weight": theirs.q_proj} if q_rank is None else {
            "q_down.weight": theirs.q_a_proj, "q_norm.weight": theirs.q_a_layernorm, "q_up.weight": theirs.q_b_proj}),
    }  # fmt: skip
    named = dict(ours.named_parameters())
    assert named.keys() == pairs.keys()
    for name, module in pairs.items():
        named[name].data = module.weight.data.view_as(named[name]).clone()
    x = torch.randn(B, S, H, generator=generator, dtype=torch.float64)
    positions = torch.arange(S).expand(B, -1)
    mask = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    cos_sin = DeepseekV3RotaryEmbedding(config)(x, positions)
    expected, _ = theirs(x, position_embeddings=cos_sin, attention_mask=mask)
    inputs = AttentionInputs(rotary_tables(model, positions, torch.float64))
    y = ours(x.flatten(0, 1), inputs, ForwardContext(batch_size=B))
    torch.testing.assert_close(y.view_as(expected), expected, rtol=1e-5, atol=1e-5)  # their tables are in fp32
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(grad)
    y.backward(grad.flatten(0, 1))
    for name, module in pairs.items():
        found = named[name].grad
        assert found is not None
        torch.testing.assert_close(found.view_as(module.weight), module.weight.grad, rtol=1e-4, atol=1e-5, msg=name)
