"""Routing by compiled ops against the same routing as users write it in torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate
from tools.benchmarks.harness import CLOCKS, DTYPES, Dtype, Rows, Run
from tools.benchmarks.ops import OpBenchmark, op_row

#: Ways back from rows to tokens.
PLAIN_WAYS = ("index_add", "gather", "embedding_bag")


def route_plain(logits_TE: Tensor, x_TH: Tensor, topk: int, combine: str) -> tuple[Tensor, Tensor]:
    """Routing in torch: topk, sort, index_select, and one of three ways back."""
    num_experts = logits_TE.shape[1]
    scores_TE = torch.softmax(logits_TE, dim=1)
    probs_TK, ids_TK = torch.topk(scores_TE, topk, dim=1)
    probs_TK = probs_TK / probs_TK.sum(dim=1, keepdim=True)
    load_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
    aux = (scores_TE.sum(dim=0) * load_E).sum() / logits_TE.shape[0] ** 2
    order_N = torch.argsort(ids_TK.flatten(), stable=True)
    token_N = order_N // topk
    rows_NH = x_TH.index_select(0, token_N)
    if combine == "index_add":
        weighted_NH = rows_NH * probs_TK.flatten()[order_N][:, None].to(rows_NH.dtype)
        y_TH = torch.zeros_like(x_TH).index_add(0, token_N, weighted_NH)
        return y_TH, aux
    inverse_TK = torch.argsort(order_N).view(-1, topk)
    if combine == "gather":
        return (rows_NH[inverse_TK] * probs_TK[..., None].to(rows_NH.dtype)).sum(dim=1), aux
    weights_TK = probs_TK.to(rows_NH.dtype)
    return functional.embedding_bag(inverse_TK, rows_NH, per_sample_weights=weights_TK, mode="sum"), aux


def route_compiled(logits_TE: Tensor, x_TH: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Routing by the ops of this package."""
    gate = topk_gate(logits_TE, topk)
    permutation = make_permutation(gate.ids_TK, logits_TE.shape[1])
    y_TH = unpermute(permute(x_TH, permutation), gate.probs_TK, permutation)
    aux = (gate.score_sum_GE * gate.counts_GE).sum() / logits_TE.shape[0] ** 2
    return y_TH, aux


@dataclass(frozen=True, kw_only=True)
class Dispatch(OpBenchmark):
    """softmax gate, permutation, weighted un-permutation of an expert that does nothing; forward and backward

    The rows "as it comes" set ours, with freed memory kept as the pretrain program keeps it, against torch in a process
    that does not.
    """

    name = "dispatch"

    tokens: int = 8192
    hidden_size: int = 1024
    num_experts: int = 64
    topk: int = 2
    dtype: tuple[Dtype, ...] = ("fp32", "bf16")

    def rows(self) -> Rows:
        rows = []
        for dtype in self.dtype:
            variants = self.variants(dtype)
            with ProcessPoolExecutor(
                1, get_context("spawn"), initializer=_prepare, initargs=(self, dtype, torch.get_num_threads())
            ) as elsewhere:
                asked = {way: lambda way=way: elsewhere.submit(_seconds, way).result() for way in PLAIN_WAYS}
                medians = self.medians({**variants, **{f"{way}, as it comes": run for way, run in asked.items()}})
            rows.append(op_row("dispatch", dtype, {name: medians[name] for name in variants}))
            apart = {way: medians[f"{way}, as it comes"] for way in PLAIN_WAYS}
            rows.append(op_row("dispatch, torch as it comes", dtype, {"compiled": medians["compiled"], **apart}))
        return rows

    def variants(self, dtype: str) -> dict[str, Run]:
        """Returns both ways of routing, forward and backward."""
        logits_TE = torch.randn(self.tokens, self.num_experts, requires_grad=True)
        x_TH = torch.randn(self.tokens, self.hidden_size).to(DTYPES[dtype]).requires_grad_()
        dy_TH = torch.randn(self.tokens, self.hidden_size).to(DTYPES[dtype])

        def both_ways(route: Callable[..., tuple[Tensor, Tensor]], *rest: str) -> None:
            y_TH, aux = route(logits_TE, x_TH, self.topk, *rest)
            torch.autograd.grad((y_TH, aux), (logits_TE, x_TH), (dy_TH, torch.ones(())))

        plain: dict[str, Run] = {way: partial(both_ways, route_plain, way) for way in PLAIN_WAYS}
        return {"compiled": partial(both_ways, route_compiled), **plain}


#: Of the process that frees memory as glibc does unless it is told otherwise.
_elsewhere: dict[str, Run] = {}
_clock = CLOCKS["wall"]


def _prepare(options: Dispatch, dtype: str, threads: int) -> None:
    global _clock
    torch.set_num_threads(threads)
    _elsewhere.update(options.variants(dtype))
    _clock = CLOCKS[options.clock]


def _seconds(way: str) -> float:
    started = _clock()
    _elsewhere[way]()
    return _clock() - started
