"""Attention against one written out head by head, with positions as complex numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
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
        return x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
    assert norm.bias is not None
    return scaled * norm.weight + norm.bias


def rotate(x_SD: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """Turns channel pairs (i, i + R/2) as complex numbers by exp(i * position * base^(-2i/R))."""
    R = round(D * config.rotary_percent)
    z = torch.complex(x_SD[:, : R // 2], x_SD[:, R // 2 : R])
    angles = positions.double()[:, None] * torch.tensor([config.rotary_base ** (-2 * i / R) for i in range(R // 2)])
    z = z * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag, x_SD[:, R:]), 1)


def naive(
    attention: SelfAttention,
    x_TH: Tensor,
    config: ModelConfig,
    positions_BS: Tensor | None = None,
    documents_BS: Tensor | None = None,
) -> Tensor:
    weight, bias = attention.qkv.weight, attention.qkv.bias
    per_group = A // config.num_kv_heads
    outputs = []
    for b, x_SH in enumerate(x_TH.split(S)):
        heads = []
        for a in range(A):
            group, place = divmod(a, per_group)

            def project(row: int, x: Tensor = x_SH, group: int = group) -> Tensor:
                y = x @ weight[group, row].T
                return y if bias is None else y + bias[group, row]

            def cut(x: Tensor) -> Tensor:
                return x if config.clip_qkv is None else x.clamp(-config.clip_qkv, config.clip_qkv)

            q = cut(normalize(project(place), attention.q_norm, config))
            k = cut(normalize(project(per_group), attention.k_norm, config))
            v = cut(project(per_group + 1))
            if config.position_embedding_type == "rope":
                positions = torch.arange(S) if positions_BS is None else positions_BS[b]
                q, k = rotate(q, positions, config), rotate(k, positions, config)
            rows = []
            for i in range(S):
                first = 0 if config.sliding_window is None else max(0, i + 1 - config.sliding_window)
                seen = [
                    j for j in range(first, i + 1) if documents_BS is None or documents_BS[b, j] == documents_BS[b, i]
                ]
                scores = torch.stack([(q[i] * k[j]).sum() for j in seen]) * (config.attention_multiplier or D**-0.5)
                if config.attn_logit_softcapping is not None:
                    scores = config.attn_logit_softcapping * (scores / config.attn_logit_softcapping).tanh()
                rows.append(scores.softmax(0) @ v[seen])
            heads.append(torch.stack(rows))
        outputs.append(torch.cat(heads, 1))
    y = torch.cat(outputs) @ attention.output.weight.T
    return y if attention.output.bias is None else y + attention.output.bias


STYLES: dict[str, dict[str, Any]] = TABLE["styles"]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_output_and_gradients_equal_the_naive_ones(style: str, documents: bool) -> None:
    config = replace(MODEL, **STYLES[style])
    attention = make(config)
    positions = documents_BS = None
    if documents:
        documents_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1]])
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4, 5]])
    shown = torch.arange(S).expand(B, -1) if positions is None else positions
    rotary = rotary_tables(config, shown, torch.float64) if config.position_embedding_type == "rope" else None
    inputs = AttentionInputs(rotary, None if documents_BS is None else Documents(documents_BS))
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
