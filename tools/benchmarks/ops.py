"""Compiled ops against the same work in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_samoe.errors import ExtensionError
from megatron_samoe.ops import cpu_products, extension
from megatron_samoe.ops.adamw import AdamWRates, AdamWRun, adamw
from megatron_samoe.ops.attention import PLAIN, attention
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.cross_entropy import cross_entropy_backward, cross_entropy_parts
from megatron_samoe.ops.decode import linear, stored
from megatron_samoe.ops.document_attention import Documents, document_attention
from tools.benchmarks.harness import (
    DTYPES,
    Dtype,
    ProcessBenchmark,
    Row,
    Rows,
    Run,
    Variants,
    forget_peak,
    milliseconds,
    process_status_kb,
    speed,
)


@dataclass(frozen=True, kw_only=True)
class OpBenchmark(ProcessBenchmark):
    """A compiled op, by "compiled", and what else does its work."""

    rounds: int = 15
    """counted rounds; medians are reported"""

    def run(self) -> int | None:
        if not extension.load():
            raise ExtensionError("There is nothing to compare: the compiled extension is not usable.")
        return super().run()


def op_row(op: str, dtype: str, medians: dict[str, float], ours: str = "compiled", **more: Any) -> Row:
    """Returns milliseconds of each contestant, and our speed over each other's."""
    others = [name for name in medians if name != ours]
    return {"op": op, "dtype": dtype, **milliseconds(medians), **speed(medians, ours, *others), **more}


def op_row_beside_copy(op: str, dtype: str, medians: dict[str, float], moved: float, copied: float, **more: Any) -> Row:
    """Returns the same with the share of a copy's bandwidth at which the compiled op moves its bytes."""
    share = round(moved / medians["compiled"] / (copied / medians["copy"]), 3)
    rest = {contestant: seconds for contestant, seconds in medians.items() if contestant != "copy"}
    return op_row(op, dtype, rest, share_of_copy_bandwidth=share, **more)


def rises_of_peak(variants: Variants) -> Row:
    """Returns the MB by which runs raise the process's memory above what it holds now; None where Linux does not say."""
    return {f"{name} peak mb": _rise_of_peak(run) for name, run in variants.items()}


def _rise_of_peak(run: Run) -> int | None:
    try:
        forget_peak()
        before = process_status_kb("VmRSS")
        run()
        return (process_status_kb("VmHWM") - before) // 1024
    except OSError:
        return None


@dataclass(frozen=True, kw_only=True)
class Pool(OpBenchmark):
    """all layers' weights from the banks, and both gradients, against matrix products of the same"""

    name = "pool"

    banks: int = 4
    elements: int = 32 << 20
    layers: tuple[int, ...] = (12, 1)

    def rows(self) -> Rows:
        banks_PGN = torch.randn(self.banks, 1, self.elements)
        rows = []
        for layers in self.layers:
            a_LGP = torch.randn(layers, 1, self.banks)
            out_LGN, dbanks_PGN = torch.empty(layers, 1, self.elements), torch.zeros_like(banks_PGN)
            dW_LGN = torch.randn(layers, 1, self.elements)
            a_LP, t_PN, dw_LN, dt_PN = a_LGP[:, 0], banks_PGN[:, 0], dW_LGN[:, 0], dbanks_PGN[:, 0]

            def matmul_backward(a_LP: Tensor = a_LP, dw_LN: Tensor = dw_LN, dt_PN: Tensor = dt_PN) -> None:
                dt_PN.addmm_(a_LP.t(), dw_LN)
                torch.matmul(dw_LN, banks_PGN[:, 0].t())

            forward: Variants = {
                "compiled": partial(combine_banks, a_LGP, banks_PGN, out_LGN),
                "matmul": partial(torch.matmul, a_LP, t_PN, out=out_LGN[:, 0]),
            }
            backward: Variants = {
                "compiled": partial(combine_banks_backward, a_LGP, banks_PGN, dW_LGN, dbanks_PGN),
                "matmul": matmul_backward,
            }
            # Bytes that must move: banks and weights once; banks, their gradient (twice) and the layers' gradients once.
            moved = {"forward": self.banks + layers, "backward": 3 * self.banks + layers}
            for name, variants in (("forward", forward), ("backward", backward)):
                medians = self.medians({**variants, "copy": partial(out_LGN.copy_, dW_LGN)})
                rows.append(
                    op_row_beside_copy(f"pool {name}, {layers} layers", "fp32", medians, moved[name], 2 * layers)
                )
        return rows


@dataclass(frozen=True, kw_only=True)
class Linear(OpBenchmark):
    """a linear layer of inference over many tokens: streamed, as whole products, and torch's product

    ops/cpu_products.py chooses between the first two. torch's operands are all of the weights' type.
    """

    name = "linear"

    tokens: tuple[int, ...] = (16, 64, 128, 512)
    sizes: tuple[tuple[int, int], ...] = ((2048, 2048), (512, 2048), (2048, 512))
    """inputs and outputs"""
    dtype: tuple[Dtype, ...] = ("fp32", "bf16")

    def rows(self) -> Rows:
        shapes = itertools.product(self.dtype, self.sizes, self.tokens)
        return [self._row(dtype, inputs, outputs, tokens) for dtype, (inputs, outputs), tokens in shapes]

    def _row(self, dtype: Dtype, inputs: int, outputs: int, tokens: int) -> Row:
        weight = stored(torch.randn(outputs, inputs) * inputs**-0.5, dtype)
        x, out = torch.randn(tokens, inputs), torch.empty(tokens, outputs)

        def ours(least: int) -> None:
            with cpu_products.using(fp32_tokens=least, bf16_tokens=least):
                linear(x, weight, None, out)

        cast = x.to(weight.data.dtype)
        run: Variants = {
            "products": partial(ours, 1),
            "streamed": partial(ours, tokens + 1),
            "torch": partial(torch.matmul, cast, weight.data.t()),
        }
        return op_row(f"linear {inputs} x {outputs}, {tokens} tokens", dtype, self.medians(run), "products")


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(OpBenchmark):
    """loss and gradient of logits over a vocabulary of GPT-2's size"""

    name = "cross-entropy"

    tokens: int = 2048
    vocab_size: int = 50_304
    dtype: tuple[Dtype, ...] = ("fp32", "bf16")

    def rows(self) -> Rows:
        return [self._row(dtype) for dtype in self.dtype]

    def _row(self, dtype: str) -> Row:
        logits_TV = torch.randn(self.tokens, self.vocab_size).to(DTYPES[dtype]).requires_grad_()
        labels_T = torch.randint(0, self.vocab_size, (self.tokens,))
        dloss_T = torch.full((self.tokens,), 1 / self.tokens)

        def compiled() -> None:
            peak_T, sum_T, target_T = cross_entropy_parts(logits_TV, labels_T)
            logsumexp_T = sum_T.log() + peak_T
            assert (logsumexp_T - target_T).isfinite().all()
            cross_entropy_backward(logits_TV, labels_T, 0, logsumexp_T, dloss_T)

        def plain() -> None:
            loss_T = functional.cross_entropy(logits_TV, labels_T, reduction="none")
            torch.autograd.grad(loss_T, logits_TV, dloss_T.to(loss_T.dtype))

        variants = {"compiled": compiled, "torch": plain}
        memory = rises_of_peak(variants)
        return op_row("cross-entropy", dtype, self.medians(variants), **memory)


@dataclass(frozen=True, kw_only=True)
class AdamW(OpBenchmark):
    """AdamW over so many elements in 64 tensors: fp32 weights, and bf16 weights with fp32 masters"""

    name = "adamw"

    elements: int = 64 << 20
    dtype: tuple[Dtype, ...] = ("fp32", "bf16")

    def rows(self) -> Rows:
        rows = []
        for dtype in self.dtype:
            variants = self._variants(dtype)
            memory = rises_of_peak(variants)
            copy = partial(torch.empty(self.elements).copy_, torch.randn(self.elements))
            medians = self.medians({**variants, "copy": copy})
            moved = 30 if dtype == "bf16" else 28
            rows.append(op_row_beside_copy("adamw", dtype, medians, moved, 8, **memory))
        return rows

    def _variants(self, dtype: str) -> Variants:
        masters = [torch.randn(self.elements // 64) for _ in range(64)]
        weights = [None if dtype == "fp32" else m.bfloat16() for m in masters]
        grads = [torch.randn_like(m) for m in masters]
        runs = [
            AdamWRun(m, w, g, torch.zeros_like(m), torch.zeros_like(m))
            for m, w, g in zip(masters, weights, grads, strict=True)
        ]
        variants: dict[str, Run] = {"compiled": partial(adamw, runs, AdamWRates(1e-4, 0.9, 0.95, 1e-8, 0.1), 7)}

        def step(optimizer: torch.optim.Optimizer, theirs: list[Tensor]) -> None:
            optimizer.step()
            for w, p in zip(weights, theirs, strict=True):
                if w is not None:
                    w.copy_(p.detach())

        for kind in ("fused", "foreach"):
            theirs = [m.clone().requires_grad_() for m in masters]
            for p, g in zip(theirs, grads, strict=True):
                p.grad = g
            ways: dict[str, Any] = {kind: True}
            optimizer = torch.optim.AdamW(theirs, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **ways)
            variants[f"torch {kind}"] = partial(step, optimizer, theirs)
            step(optimizer, theirs)  # makes its moments
        return variants


@dataclass(frozen=True, kw_only=True)
class DocumentAttention(OpBenchmark):
    """attention within documents of one length that share a sequence, forward and backward, against a mask of all pairs"""

    name = "document-attention"

    seq_length: int = 4096
    documents: int = 8
    num_heads: int = 8
    head_dim: int = 64
    dtype: tuple[Dtype, ...] = ("fp32", "bf16")

    def rows(self) -> Rows:
        return [self._row(dtype) for dtype in self.dtype]

    def _row(self, dtype: str) -> Row:
        cut = Documents((torch.arange(self.seq_length) * self.documents // self.seq_length)[None])
        mask = cut.mask()
        shape = (1, self.num_heads, self.seq_length, self.head_dim)
        q, k, v = inputs = [torch.randn(shape).to(DTYPES[dtype]).requires_grad_() for _ in range(3)]
        ones = torch.ones(shape, dtype=DTYPES[dtype])

        def both_ways(attend: Callable[[], Tensor]) -> None:
            torch.autograd.grad(attend(), inputs, ones)

        variants = {
            "by pieces": partial(both_ways, lambda: document_attention(q, k, v, PLAIN, cut)),
            "dense mask": partial(both_ways, lambda: attention(q, k, v, PLAIN, mask)),
            "no documents": partial(both_ways, lambda: attention(q, k, v, PLAIN)),
        }
        memory = rises_of_peak(variants)
        medians = self.medians(variants)
        ratio = speed(medians, "by pieces", "dense mask")
        return {"op": self.name, "dtype": dtype, **milliseconds(medians, 2), **ratio, **memory}
