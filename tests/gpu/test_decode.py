"""Inference's ops of a GPU against their twins on the CPU, a step in a CUDA graph, and a whole model's tokens."""

from __future__ import annotations

import pytest
import torch

from megatron_samoe.inference.decode_layers import make_decode_model
from megatron_samoe.inference.serving import Serving
from megatron_samoe.inference.single_runner import SingleRunner
from megatron_samoe.ops import decode
from megatron_samoe.ops.decode_parts import Routing
from megatron_samoe.ops.topk_gate import ChoiceRule
from tests.harness import decode_checks
from tests.unit.inference.test_runners import IDS, close, make, tables
from tests.unit.inference.tiny_models import forward_logits, step_logits
from tests.unit.ops.test_decode import make_experts, make_norm, normal

KINDS = ("fp32", "bf16", "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind: str, device: str) -> None:
    sizes = [(1, 64, 64), (3, 37, 11), (33, 1040, 130), (0, 8, 8)]
    for tokens, inputs, outputs in sizes + ([(1, 8192, 4096), (64, 512, 50257)] if device == "cuda" else []):
        decode_checks.check_linear(tokens, inputs, outputs, kind, device)


def test_norm(device: str) -> None:
    for tokens, hidden, rms in ((3, 5, True), (7, 64, False), (33, 1000, True)):
        decode_checks.check_norm(tokens, hidden, rms, device)


@pytest.mark.parametrize("kind, style", [("fp32", "gpt"), ("bf16", "rope"), ("int8", "plain")])
@pytest.mark.parametrize("groups, queries, head_dim", [(2, 1, 64), (3, 2, 20), (1, 8, 128), (1, 2, 256)])
def test_attention(groups: int, queries: int, head_dim: int, kind: str, style: str, device: str) -> None:
    for length in (7, 40, 600) if device == "cuda" else (7, 40):
        decode_checks.check_attention(groups, queries, head_dim, kind, style, length, device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
def test_experts(gated: bool, kind: str, device: str) -> None:
    cases = [(1, 4, 2, 36, 52), (33, 5, 1, 64, 128), (7, 9, 8, 36, 52), (6, 1, 0, 36, 52)]
    for tokens, experts, topk, hidden, ffn in cases + ([(200, 300, 8, 512, 256)] if device == "cuda" else []):
        decode_checks.check_mlp(tokens, experts, topk, kind, gated, device, hidden, ffn)


@pytest.mark.parametrize("kind", KINDS)
def test_combine_rows(kind: str, device: str) -> None:
    for coefficients in ([0.5, -1.25, 0.0], [0.0, 0.0, 1.0], [0.0]):
        for rows, cols in ((7, 45), (64, 512)):
            decode_checks.check_combine_rows(rows, cols, kind, coefficients, device)


def test_a_block_in_a_cuda_graph(device: str) -> None:
    """Nothing in it allocates or waits, so it can be captured; replayed, it takes what lies in its buffers then."""
    if device != "cuda":
        pytest.skip("graphs are CUDA's")
    hidden, ffn, experts = 64, 96, 8
    parts = (make_experts(hidden, ffn, experts, experts, "bf16", True, False), make_norm(hidden, True, False))
    stack, norm = decode_checks.moved(parts, device)
    routing = Routing(normal(12, experts, hidden).to(device), ChoiceRule(2))
    scratch = torch.empty(decode.mlp_scratch(4, hidden, ffn, 2, experts), device=device)
    x, inputs = torch.zeros(4, hidden, device=device), normal(1, 4, hidden).to(device)
    decode.mlp_block(x, norm, routing, stack, scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.mlp_block(x, norm, routing, stack, scratch)
    x.copy_(inputs)
    graph.replay()
    expected = inputs.clone()
    decode.mlp_block(expected, norm, routing, stack, scratch)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    "name, serving", [("dense gpt3", "folded"), ("moe shared", "folded"), ("samoe gpt3", "on-the-fly")]
)
def test_a_models_logits(name: str, serving: Serving, device: str) -> None:
    loaded = make(name, serving)
    expected = [forward_logits(loaded, ids) for ids in IDS]
    pages = tables([len(ids) for ids in IDS])
    model = make_decode_model(loaded.model, serving, "fp32", pages.num_pages)
    runner = SingleRunner(decode_checks.moved(model, device), 64, 64, 4)
    pages.table = pages.table.to(device)
    for steps in ([(0, 0, 20)], [(1, 0, 3), (2, 0, 18)], [(2, 18, 1), (0, 20, 1), (1, 3, 1)], [(0, 21, 15), (1, 4, 1)]):
        got = step_logits(runner, pages, [(slot, first, IDS[slot][first : first + n]) for slot, first, n in steps])
        for (slot, first, n), logits in zip(steps, got, strict=True):
            close(logits, expected[slot][first : first + n], 1e-5 if device == "cpu" else 1e-4)
