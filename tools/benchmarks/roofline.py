"""Each part of an MoE layer against what this machine's arithmetic and memory allow."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch

from megatron_samoe.ops.grouped_mlp import ExpertWeights, grouped_mlp_backward, grouped_mlp_forward
from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate
from tools.benchmarks.harness import DTYPES, Dtype, Row, Rows, Run
from tools.benchmarks.layer import Activation, LayerShape, Product, mlp_products, multiply
from tools.benchmarks.ops import OpBenchmark

LIMIT_BYTES = 256 << 20


@dataclass(frozen=True)
class Part:
    """What a part of the layer does: FLOPs of matrix products, and bytes of operands and results."""

    run: Run
    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Roofline(OpBenchmark):
    """parts of an MoE layer against the machine's limits

    A part of known FLOPs and bytes (each operand and result once) cannot take less than the larger of FLOPs over the speed
    of a large matrix product and bytes over the speed of a copy, both measured in the same run: its roof. "share_of_roof"
    is roof over time; what stays in a cache can pass 1.
    """

    name = "roofline"

    rounds: int = 7
    """counted rounds; medians are reported"""
    tokens: int = 4096
    hidden_size: int = 512
    ffn_hidden_size: int = 2048
    topk: int = 2
    num_experts: tuple[int, ...] = (64,)
    activation: Activation = "gelu"
    dtype: tuple[Dtype, ...] = ("fp32",)

    def rows(self) -> Rows:
        rows: Rows = []
        for dtype, experts in itertools.product(self.dtype, self.num_experts):
            sizes = self.tokens, self.hidden_size, self.ffn_hidden_size, experts, self.topk
            rows += self._rows(LayerShape(*sizes, self.activation, DTYPES[dtype]), dtype)
        return rows

    def _rows(self, shape: LayerShape, dtype: str) -> Rows:
        made = limits(shape.dtype) | parts(shape) | bare_products(shape)
        medians = self.medians({name: part.run for name, part in made.items()})
        flop_s = made["limit: product"].flops / medians["limit: product"]
        byte_s = made["limit: copy"].bytes / medians["limit: copy"]

        def row(name: str, part: Part) -> Row:
            seconds, by_flops, by_bytes = medians[name], part.flops / flop_s, part.bytes / byte_s
            return {
                "part": name,
                "experts": shape.num_experts,
                "dtype": dtype,
                "ms": round(seconds * 1e3, 3),
                "GFLOP": round(part.flops / 1e9, 2),
                "MB": round(part.bytes / 1e6, 1),
                "GFLOP:s": round(part.flops / seconds / 1e9, 1),
                "GB:s": round(part.bytes / seconds / 1e9, 1),
                "bound": "products" if by_flops > by_bytes else "memory",
                "share_of_roof": round(max(by_flops, by_bytes) / seconds, 3),
            }

        return [row(name, part) for name, part in made.items()]


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


def parts(shape: LayerShape) -> dict[str, Part]:
    """Returns the parts of a layer in the order in which they run."""
    T, H, F, K, E = shape.tokens, shape.hidden_size, shape.ffn_hidden_size, shape.topk, shape.num_experts
    U, N, dtype, size, kind = shape.up_size, shape.num_rows, shape.dtype, shape.dtype.itemsize, shape.activation
    ops = torch.ops.megatron_samoe
    x, dy = torch.randn(T, H).to(dtype), torch.randn(T, H).to(dtype)
    router = torch.randn(E, H)
    logits = torch.randn(T, E)
    probs, ids, _counts, _sums, _z, logsumexp = ops.topk_gate(logits, K, False, False, 1)
    permutation = make_permutation(ids, E)
    rows_NH = permute(x, permutation)
    rows = permutation.counts_E.tolist()
    up = (2, F) if kind == "swiglu" else (F,)
    weights = ExpertWeights(torch.randn(E, *up, H).to(dtype) * 0.02, torch.randn(E, H, F).to(dtype) * 0.02)
    grads = weights.map(lambda t: torch.zeros_like(t, dtype=torch.float32))
    y_NH, h_NU = grouped_mlp_forward(rows_NH, rows, weights, kind)
    back = (rows_NH, probs, permutation.slot_of_row_N, permutation.row_of_slot_TK)
    x32, dlogits = x.float(), torch.randn(T, E)
    of_gate = (logits, logsumexp, probs, ids, probs, None, None, False, False, 1)
    of_experts = (rows_NH, rows_NH, h_NU, rows, weights, kind, grads)

    weight_bytes, flops = E * H * (U + F) * size, 2.0 * N * H * (U + F)
    moved, of_router, of_choice = (T + N) * H * float(size), 4.0 * T * E, 12.0 * N
    forward_bytes = weight_bytes + (2 * N * H + N * U) * float(size)
    backward_bytes = weight_bytes + 8.0 * E * H * (U + F) + (3 * N * H + N * U) * float(size)
    return {
        "router product": Part(lambda: x32 @ router.t(), 2.0 * T * H * E, 4.0 * T * H + of_router),
        "gate": Part(lambda: topk_gate(logits, K), 0, of_router + of_choice),
        "counting sort": Part(lambda: make_permutation(ids, E), 0, 24.0 * N),
        "permute": Part(lambda: permute(x, permutation), 0, moved),
        "experts": Part(lambda: grouped_mlp_forward(rows_NH, rows, weights, kind), flops, forward_bytes),
        "un-permute": Part(lambda: unpermute(y_NH, probs, permutation), 0, moved),
        "un-permute backward": Part(lambda: ops.unpermute_backward(dy, *back), 0, moved + N * H * float(size)),
        "experts backward": Part(lambda: grouped_mlp_backward(*of_experts), 2 * flops, backward_bytes),
        "permute backward": Part(lambda: ops.unpermute(rows_NH, None, permutation.row_of_slot_TK), 0, moved),
        "gate backward": Part(lambda: ops.topk_gate_backward(*of_gate), 0, 2 * of_router + of_choice),
        "router backward": Part(
            lambda: (dlogits @ router, dlogits.t() @ x32), 4.0 * T * H * E, 8.0 * T * H + of_router
        ),
    }


def bare_products(shape: LayerShape) -> dict[str, Part]:
    """Returns the experts' products as torch makes them one by one, by kind, with evenly spread rows."""
    H, N = shape.hidden_size, shape.num_rows

    def one(kind: str, work: list[Product]) -> Part:
        is_wide = "first" in kind or "rows" in kind or "w1" in kind
        width = shape.up_size if is_wide else shape.ffn_hidden_size
        num_bytes = shape.dtype.itemsize * float(shape.num_experts * H * width + N * (H + width))
        return Part(partial(multiply, work), 2.0 * N * H * width, num_bytes)

    return {f"bare: {kind}": one(kind, work) for kind, work in mlp_products(shape).items()}
