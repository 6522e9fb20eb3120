"""`benchmark.py roofline`: each part of an MoE layer against what this machine's arithmetic and memory allow.

A part of known FLOPs and bytes (each operand and result once) cannot take less than the larger of FLOPs over the speed of
a large matrix product and bytes over the speed of a copy, both measured in the same run: its roof. "share_of_roof" is
roof over time; what stays in a cache can pass 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_samoe.benchmarks.common import DTYPES, Rows, add_command, add_options, add_sizes, alternate
from megatron_samoe.benchmarks.layer import Product, mlp_products, multiply, split_evenly
from megatron_samoe.cli.arguments import Options
from megatron_samoe.ops import extension
from megatron_samoe.ops.grouped_mlp import ExpertWeights, grouped_mlp_backward, grouped_mlp_forward
from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate

LIMIT_BYTES = 256 << 20


@dataclass(frozen=True)
class Part:
    """What a part of the layer does: FLOPs of matrix products, and bytes of operands and results."""

    run: Callable[[], object]
    flops: float
    bytes: float


def limits(dtype: torch.dtype) -> dict[str, Part]:
    """Returns a large matrix product and a large copy."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    c = torch.empty_like(a)
    source = torch.zeros(LIMIT_BYTES // 4)
    target = torch.zeros_like(source)
    return {
        "limit: product": Part(lambda: torch.mm(a, b, out=c), 2 * 2048.0**3, 0),
        "limit: copy": Part(lambda: target.copy_(source), 0, 2.0 * LIMIT_BYTES),
    }


def parts(options: Options, experts: int, dtype: torch.dtype) -> dict[str, Part]:
    """Returns the parts of a layer in the order in which they run."""
    T, H, F, K, E = options.tokens, options.hidden_size, options.ffn_hidden_size, options.topk, experts
    gated = options.activation == "swiglu"
    U, N, size = (2 * F if gated else F), T * K, dtype.itemsize
    ops = torch.ops.megatron_samoe
    x, dy = torch.randn(T, H).to(dtype), torch.randn(T, H).to(dtype)
    router = torch.randn(E, H)
    logits = torch.randn(T, E)
    gate = ops.topk_gate(logits, K, False, False, 1)
    probs, ids, _counts, _sums, _z, logsumexp = gate
    permutation = make_permutation(ids, E)
    rows_NH = permute(x, permutation)
    rows = permutation.counts_E.tolist()
    up = (2, F) if gated else (F,)
    weights = ExpertWeights(torch.randn(E, *up, H).to(dtype) * 0.02, torch.randn(E, H, F).to(dtype) * 0.02)
    grads = weights.map(lambda t: torch.zeros_like(t, dtype=torch.float32))
    y_NH, h_NU = grouped_mlp_forward(rows_NH, rows, weights, options.activation)
    back = (rows_NH, probs, permutation.slot_of_row_N, permutation.row_of_slot_TK)
    x32 = x.float()
    weight_bytes, grad_bytes = E * H * (U + F) * size, E * H * (U + F) * 4
    product_flops = 2.0 * N * H * (U + F)
    dlogits = torch.randn(T, E)

    def gate_backward() -> object:
        return ops.topk_gate_backward(logits, logsumexp, probs, ids, probs, None, None, False, False, 1)

    return {
        "router product": Part(lambda: x32 @ router.t(), 2.0 * T * H * E, 4.0 * (T * H + T * E)),
        "gate": Part(lambda: topk_gate(logits, K), 0, 4.0 * T * E + 12.0 * N),
        "counting sort": Part(lambda: make_permutation(ids, E), 0, 3 * 8.0 * N),
        "permute": Part(lambda: permute(x, permutation), 0, (T + N) * H * float(size)),
        "experts": Part(
            lambda: grouped_mlp_forward(rows_NH, rows, weights, options.activation),
            product_flops, weight_bytes + (2 * N * H + N * U) * float(size),
        ),
        "un-permute": Part(lambda: unpermute(y_NH, probs, permutation), 0, (T + N) * H * float(size)),
        "un-permute backward": Part(lambda: ops.unpermute_backward(dy, *back), 0, (T + 2 * N) * H * float(size)),
        "experts backward": Part(
            lambda: grouped_mlp_backward(rows_NH, rows_NH, h_NU, rows, weights, options.activation, grads),
            2 * product_flops, weight_bytes + 2.0 * grad_bytes + (3 * N * H + N * U) * float(size),
        ),
        "permute backward": Part(
            lambda: ops.unpermute(rows_NH, None, permutation.row_of_slot_TK), 0, (T + N) * H * float(size)
        ),
        "gate backward": Part(gate_backward, 0, 8.0 * T * E + 12.0 * N),
        "router backward": Part(
            lambda: (dlogits @ router, dlogits.t() @ x32), 4.0 * T * H * E, 4.0 * (2 * T * H + T * E)
        ),
    }  # fmt: skip


def bare_products(options: Options, experts: int, dtype: torch.dtype) -> dict[str, Part]:
    """Returns the experts' products as torch makes them one by one, by kind, with evenly spread rows."""
    H, F, N = options.hidden_size, options.ffn_hidden_size, options.tokens * options.topk
    U, size = (2 * F if options.activation == "swiglu" else F), dtype.itemsize

    def one(kind: str, work: list[Product]) -> Part:
        width = U if "first" in kind or "rows" in kind or "w1" in kind else F
        return Part(partial(multiply, work), 2.0 * N * H * width, size * float(experts * H * width + N * (H + width)))

    kinds = mlp_products(split_evenly(N, experts), H, U, F, dtype)
    return {f"bare: {kind}": one(kind, work) for kind, work in kinds.items()}


def run(options: Options) -> Rows:
    """Times, FLOPs, bytes and roofs of a layer's parts, and the bare products of the same shapes."""
    if not extension.load():
        raise SystemExit("The parts are those of the compiled extension, which is not usable.")
    rows = []
    for dtype in options.dtype:
        for experts in options.num_experts:
            made = limits(DTYPES[dtype])
            made |= parts(options, experts, DTYPES[dtype]) | bare_products(options, experts, DTYPES[dtype])
            medians = alternate({name: part.run for name, part in made.items()}, options.rounds, options.clock)
            flop_s = made["limit: product"].flops / medians["limit: product"]
            byte_s = made["limit: copy"].bytes / medians["limit: copy"]
            for name, part in made.items():
                seconds = medians[name]
                by_flops, by_bytes = part.flops / flop_s, part.bytes / byte_s
                rows.append({
                    "part": name, "experts": experts, "dtype": dtype, "ms": round(seconds * 1e3, 3),
                    "GFLOP": round(part.flops / 1e9, 2), "MB": round(part.bytes / 1e6, 1),
                    "GFLOP:s": round(part.flops / seconds / 1e9, 1), "GB:s": round(part.bytes / seconds / 1e9, 1),
                    "bound": "products" if by_flops > by_bytes else "memory",
                    "share_of_roof": round(max(by_flops, by_bytes) / seconds, 3),
                })  # fmt: skip
    return rows


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    add = add_command(commands, "roofline", "parts of an MoE layer against the machine's limits", run)
    add_sizes(add, tokens=4096, hidden_size=512, ffn_hidden_size=2048, topk=2)
    add("--num-experts", [64])
    add("--activation", ("gelu", "swiglu"))
    add("--dtype", [tuple(DTYPES)], default=["fp32"])
    add_options(add)
