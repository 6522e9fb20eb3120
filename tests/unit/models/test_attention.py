"""Attention against one written out head by head, with positions as complex numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_samoe.config import ModelConfig
from megatron_samoe.models.attention import AttentionInputs, SelfAttention
from megatron_samoe.models.norms import Norm
from megatron_samoe.models.rotary import rotary_tables
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops.document_attention import Documents
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.tensor_parallel.random import SampleRandom
from tests.harness.tables import table

TABLE = table(__file__)
B, S, H, A, D = 2, 7, 12, 6, 4
MODEL = ModelConfig(hidden_size=H, num_attention_heads=A, kv_channels=D, seq_length=S, num_layers=2)
STATE = single_process_state()


def make(config: ModelConfig, recompute_core: bool = False) -> SelfAttention:
    attention = SelfAttention(config, 1, STATE, torch.float64, recompute_core)
    generator = torch.Generator().manual_seed(0)
    for p in attention.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    return attention


def hidden(seed: int = 1) -> Tensor:
    return torch.randn(B * S, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normalize(x: Tensor, norm: Norm | None, config: ModelConfig) -> Tensor:
    if norm is None:
        return x
    if config.normalization == "RMSNorm":
        return F.rms_norm(x, x.shape[-1:], norm.weight, config.norm_epsilon)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, config.norm_epsilon)


def rotate(x_BASD: Tensor, positions_BS: Tensor, config: ModelConfig) -> Tensor:
    """Turns channel pairs (i, i + R/2) as complex numbers by exp(i * position * base^(-2i/R))."""
    R = round(D * config.rotary_percent)
    z = torch.complex(x_BASD[..., : R // 2], x_BASD[..., R // 2 : R])
    angles = positions_BS.double()[:, None, :, None] * config.rotary_base ** (-torch.arange(0, R, 2).double() / R)
    z = z * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag, x_BASD[..., R:]), -1)


def naive(
    attention: SelfAttention, x_TH: Tensor, config: ModelConfig, positions_BS: Tensor, documents_BS: Tensor
) -> Tensor:
    """Returns the layer's output in torch's own operations, with all scores at once."""
    per_group, clip, cap = A // config.num_kv_heads, config.clip_qkv, config.attn_logit_softcapping
    projected = torch.einsum("bsh,grdh->bsgrd", x_TH.view(B, S, H), attention.qkv.weight)
    if attention.qkv.bias is not None:
        projected = projected + attention.qkv.bias
    q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in projected.split((per_group, 1, 1), 3))
    q, k = normalize(q, attention.q_norm, config), normalize(k, attention.k_norm, config)
    if clip is not None:
        q, k, v = (t.clamp(-clip, clip) for t in (q, k, v))
    if config.position_embedding_type == "rope":
        q, k = rotate(q, positions_BS, config), rotate(k, positions_BS, config)
    k, v = (t.repeat_interleave(per_group, 1) for t in (k, v))
    scores = q @ k.mT * (config.attention_multiplier or D**-0.5)
    scores = scores if cap is None else cap * (scores / cap).tanh()
    back = torch.arange(S)[:, None] - torch.arange(S)
    seen = (back >= 0) & (back < (config.sliding_window or S)) & (documents_BS[:, :, None] == documents_BS[:, None])
    y = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v
    return F.linear(y.transpose(1, 2).flatten(2).flatten(0, 1), attention.output.weight, attention.output.bias)


STYLES: dict[str, dict[str, Any]] = TABLE["styles"]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_output_and_gradients_equal_the_naive_ones(style: str, documents: bool) -> None:
    config = replace(MODEL, **STYLES[style])
    attention = make(config)
    positions, documents_BS = torch.arange(S).expand(B, -1), torch.zeros(B, S, dtype=torch.long)
    if documents:
        documents_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1]])
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4, 5]])
    rotary = rotary_tables(config, positions, torch.float64) if config.position_embedding_type == "rope" else None
    inputs = AttentionInputs(rotary, Documents(documents_BS) if documents else None)
    x = [hidden().requires_grad_(), hidden().requires_grad_()]
    ys = [attention(x[0], inputs, ForwardContext(B)), naive(attention, x[1], config, positions, documents_BS)]
    torch.testing.assert_close(ys[0], ys[1], rtol=1e-6, atol=1e-6)  # rotary tables are made in fp32
    dy = hidden(9)
    results = [torch.autograd.grad(y, [own, *attention.parameters()], dy) for y, own in zip(ys, x, strict=True)]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * max(float(wanted.abs().max()), 1e-6))
    if rotary is None:
        torch.testing.assert_close(ys[0], ys[1], rtol=1e-12, atol=1e-12)


def training(samples: tuple[int, ...] = (0, 1)) -> ForwardContext:
    return ForwardContext(batch_size=B, training=True, random=SampleRandom(3, 4, samples))


def test_attention_dropout_acts_while_training_and_comes_back_in_recomputation() -> None:
    config = replace(MODEL, attention_dropout=0.5)
    x = hidden().requires_grad_()
    plain, recomputed = make(config), make(config, recompute_core=True)
    evaluated = plain(x, AttentionInputs(), ForwardContext(B))
    y, again, other = (
        m(x, AttentionInputs(), c)
        for m, c in ((plain, training()), (recomputed, training()), (plain, training((5, 6))))
    )
    assert torch.equal(y, again) and not torch.equal(y, evaluated) and not torch.equal(y, other)
    before = torch.get_rng_state()
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, again)]
    assert torch.equal(*gradients)
    assert torch.equal(before, torch.get_rng_state()), "torch's generator is left as it was"
    torch.testing.assert_close(evaluated, make(MODEL)(x, AttentionInputs(), training()))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms_equal_their_formulas(kind: Any) -> None:
    config = replace(MODEL, normalization=kind, norm_epsilon=0.1)
    norm = Norm(config, H, STATE, torch.float64)
    nn.init.normal_(norm.weight)
    if norm.bias is not None:
        nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(hidden()), normalize(hidden(), norm, config), rtol=1e-12, atol=1e-12)
