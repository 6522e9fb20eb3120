"""`benchmark.py dispatch`, `pool`, `cross-entropy`, `adamw`: compiled ops against the same work in plain torch."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_samoe.benchmarks.common import (
    CLOCKS,
    DTYPES,
    Row,
    Rows,
    Variants,
    add_command,
    add_options,
    add_sizes,
    alternate,
    forget_peak,
    process_status_kb,
)
from megatron_samoe.cli.arguments import Options
from megatron_samoe.ops import extension
from megatron_samoe.ops.adamw import AdamWRates, AdamWRun, adamw
from megatron_samoe.ops.attention import PLAIN, attention
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.cross_entropy import cross_entropy_backward, cross_entropy_parts
from megatron_samoe.ops.document_attention import Documents, document_attention
from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate


def _row(name: str, dtype: str, medians: dict[str, float], **more: Any) -> Row:
    """Milliseconds of each contestant, and the compiled one's speed over each other's."""
    ours, theirs = medians["compiled"], {k: v for k, v in medians.items() if k != "compiled"}
    ratios = {f"compiled / {other}": round(seconds / ours, 2) for other, seconds in theirs.items()}
    return {"op": name, "dtype": dtype, **{f"{k} ms": round(v * 1e3, 3) for k, v in medians.items()}, **ratios, **more}


def _row_beside_copy(name: str, dtype: str, medians: dict[str, float], moved: float, copied: float, **more: Any) -> Row:
    """The same, with the share of a copy's bandwidth at which the compiled one moves its bytes."""
    share = round(moved / medians["compiled"] / (copied / medians["copy"]), 3)
    rest = {contestant: seconds for contestant, seconds in medians.items() if contestant != "copy"}
    return _row(name, dtype, rest, share_of_copy_bandwidth=share, **more)


def route_plain(logits_TE: Tensor, x_TH: Tensor, topk: int, combine: str) -> tuple[Tensor, Tensor]:
    """The same routing as users write it in torch: topk, sort, index_select, and one of three ways back."""
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


def _dispatch_variants(options: Options, dtype: str) -> Variants:
    logits_TE = torch.randn(options.tokens, options.num_experts, requires_grad=True)
    x_TH = torch.randn(options.tokens, options.hidden_size).to(DTYPES[dtype]).requires_grad_()
    dy_TH = torch.randn(options.tokens, options.hidden_size).to(DTYPES[dtype])

    def both_ways(route: Callable[..., tuple[Tensor, Tensor]], *rest: str) -> None:
        y_TH, aux = route(logits_TE, x_TH, options.topk, *rest)
        torch.autograd.grad((y_TH, aux), (logits_TE, x_TH), (dy_TH, torch.ones(())))

    plain = {way: partial(both_ways, route_plain, way) for way in ("index_add", "gather", "embedding_bag")}
    return {"compiled": partial(both_ways, route_compiled), **plain}


def _dispatch_aside(options: Options, dtype: str, threads: int, connection: Any) -> None:
    torch.set_num_threads(threads)
    variants, clock = _dispatch_variants(options, dtype), CLOCKS[options.clock]
    for name in iter(connection.recv, None):
        started = clock()
        variants[name]()
        connection.send(clock() - started)


@contextmanager
def _as_it_comes(options: Options, dtype: str, names: list[str]) -> Iterator[Variants]:
    """Gives the plain variants in a process that frees memory as glibc does unless it is told otherwise."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_dispatch_aside, args=(options, dtype, torch.get_num_threads(), theirs))
    process.start()

    def ask(name: str) -> object:
        ours.send(name)
        return ours.recv()

    try:
        yield {f"{name}, as it comes": partial(ask, name) for name in names}
    finally:
        ours.send(None)
        process.join()


def dispatch(options: Options) -> Rows:
    """Softmax gate, permutation, weighted un-permutation of an expert that does nothing; forward and backward.

    The rows "as it comes" set ours, with freed memory kept as the pretrain program keeps it, against torch in a process
    that does not.
    """
    rows = []
    for dtype in options.dtype:
        variants = _dispatch_variants(options, dtype)
        plain = [name for name in variants if name != "compiled"]
        with _as_it_comes(options, dtype, plain) as asked:
            medians = alternate({**variants, **asked}, options.rounds, options.clock)
        rows.append(_row("dispatch", dtype, {name: medians[name] for name in variants}))
        apart = {name: medians[f"{name}, as it comes"] for name in plain}
        rows.append(_row("dispatch, torch as it comes", dtype, {"compiled": medians["compiled"], **apart}))
    return rows


def pool(options: Options) -> Rows:
    """All layers' weights from the banks, and both gradients, against matrix products of the same."""
    banks_PGN = torch.randn(options.banks, 1, options.elements)
    rows = []
    for layers in options.layers:
        a_LGP = torch.randn(layers, 1, options.banks)
        out_LGN, dbanks_PGN = torch.empty(layers, 1, options.elements), torch.zeros_like(banks_PGN)
        dW_LGN = torch.randn(layers, 1, options.elements)
        a_LP, t_PN, dw_LN, dt_PN = a_LGP[:, 0], banks_PGN[:, 0], dW_LGN[:, 0], dbanks_PGN[:, 0]
        copy = partial(out_LGN.copy_, dW_LGN)
        forward: Variants = {
            "compiled": partial(combine_banks, a_LGP, banks_PGN, out_LGN),
            "matmul": partial(torch.matmul, a_LP, t_PN, out=out_LGN[:, 0]),
            "copy": copy,
        }
        backward: Variants = {
            "compiled": partial(combine_banks_backward, a_LGP, banks_PGN, dW_LGN, dbanks_PGN),
            "matmul": partial(_combine_backward_plain, a_LP, t_PN, dw_LN, dt_PN),
            "copy": copy,
        }
        # Bytes that must move: banks and weights once; banks, their gradient (twice) and the layers' gradients once.
        for name, variants, moved in (
            ("forward", forward, options.banks + layers), ("backward", backward, 3 * options.banks + layers),
        ):  # fmt: skip
            medians = alternate(variants, options.rounds, options.clock)
            rows.append(_row_beside_copy(f"pool {name}, {layers} layers", "fp32", medians, moved, 2 * layers))
    return rows


def _combine_backward_plain(a_LP: Tensor, t_PN: Tensor, dw_LN: Tensor, dt_PN: Tensor) -> None:
    dt_PN.addmm_(a_LP.t(), dw_LN)
    torch.matmul(dw_LN, t_PN.t())


def _cross_entropy_variants(options: Options, dtype: str) -> Variants:
    logits_TV = torch.randn(options.tokens, options.vocab_size).to(DTYPES[dtype]).requires_grad_()
    labels_T = torch.randint(0, options.vocab_size, (options.tokens,))
    dloss_T = torch.full((options.tokens,), 1 / options.tokens)

    def compiled() -> None:
        peak_T, sum_T, target_T = cross_entropy_parts(logits_TV, labels_T)
        logsumexp_T = sum_T.log() + peak_T
        assert (logsumexp_T - target_T).isfinite().all()
        cross_entropy_backward(logits_TV, labels_T, 0, logsumexp_T, dloss_T)

    def plain() -> None:
        loss_T = functional.cross_entropy(logits_TV, labels_T, reduction="none")
        torch.autograd.grad(loss_T, logits_TV, dloss_T.to(loss_T.dtype))

    return {"compiled": compiled, "torch": plain}


def cross_entropy(options: Options) -> Rows:
    """Loss and gradient of logits over a vocabulary of GPT-2's size."""
    rows = []
    for dtype in options.dtype:
        variants = _cross_entropy_variants(options, dtype)
        memory = _rises_of_peak(variants)
        rows.append(_row("cross-entropy", dtype, alternate(variants, options.rounds, options.clock), **memory))
    return rows


def _rises_of_peak(variants: Variants) -> dict[str, int | None]:
    """Returns the MB by which runs raise the process's memory above what it holds now; None where that is not told."""
    return {f"{name} peak mb": _rise_of_peak(run) for name, run in variants.items()}


def _rise_of_peak(run: Callable[[], object]) -> int | None:
    try:
        forget_peak()
        before = process_status_kb("VmRSS")
        run()
        return (process_status_kb("VmHWM") - before) // 1024
    except OSError:
        return None


def _adamw_variants(options: Options, dtype: str) -> Variants:
    masters = [torch.randn(options.elements // 64) for _ in range(64)]
    weights = [None if dtype == "fp32" else m.bfloat16() for m in masters]
    grads = [torch.randn_like(m) for m in masters]
    runs = [
        AdamWRun(m, w, g, torch.zeros_like(m), torch.zeros_like(m))
        for m, w, g in zip(masters, weights, grads, strict=True)
    ]
    variants = {"compiled": partial(adamw, runs, AdamWRates(1e-4, 0.9, 0.95, 1e-8, 0.1), 7)}

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


def adamw_steps(options: Options) -> Rows:
    """AdamW over so many elements in 64 tensors: fp32 weights, and bf16 weights with fp32 masters."""
    rows = []
    for dtype in options.dtype:
        variants = _adamw_variants(options, dtype)
        memory = _rises_of_peak(variants)
        copy = partial(torch.empty(options.elements).copy_, torch.randn(options.elements))
        medians = alternate({**variants, "copy": copy}, options.rounds, options.clock)
        moved = 30 if dtype == "bf16" else 28
        rows.append(_row_beside_copy("adamw", dtype, medians, moved, 8, **memory))
    return rows


def _document_variants(options: Options, dtype: str) -> Variants:
    length = options.seq_length
    cut = Documents((torch.arange(length) * options.documents // length)[None])
    mask = cut.mask()
    shape = (1, options.num_heads, length, options.head_dim)
    q, k, v = inputs = [torch.randn(shape).to(DTYPES[dtype]).requires_grad_() for _ in range(3)]
    ones = torch.ones(shape, dtype=DTYPES[dtype])

    def both_ways(attend: Callable[[], Tensor]) -> None:
        torch.autograd.grad(attend(), inputs, ones)

    return {
        "by pieces": partial(both_ways, lambda: document_attention(q, k, v, PLAIN, cut)),
        "dense mask": partial(both_ways, lambda: attention(q, k, v, PLAIN, mask)),
        "no documents": partial(both_ways, lambda: attention(q, k, v, PLAIN)),
    }


def documents(options: Options) -> Rows:
    """Attention within documents of one length that share a sequence, forward and backward, against a mask of all pairs."""
    rows = []
    for dtype in options.dtype:
        variants = _document_variants(options, dtype)
        memory = _rises_of_peak(variants)
        medians = alternate(variants, options.rounds, options.clock)
        times = {f"{name} ms": round(seconds * 1e3, 2) for name, seconds in medians.items()}
        ratio = round(medians["dense mask"] / medians["by pieces"], 2)
        rows.append({"op": "document-attention", "dtype": dtype, **times, "by pieces / dense mask": ratio, **memory})
    return rows


def _run(options: Options) -> Rows:
    if not extension.load():
        raise SystemExit("There is nothing to compare: the compiled extension is not usable.")
    rows: Rows = OPS[options.command][0](options)
    return rows


#: Runs by name, and the sizes that they take.
OPS: dict[str, tuple[Callable[[Options], Rows], dict[str, int]]] = {
    "dispatch": (dispatch, {"tokens": 8192, "hidden_size": 1024, "num_experts": 64, "topk": 2}),
    "pool": (pool, {"banks": 4, "elements": 32 << 20}),
    "cross-entropy": (cross_entropy, {"tokens": 2048, "vocab_size": 50_304}),
    "document-attention": (documents, {"seq_length": 4096, "documents": 8, "num_heads": 8, "head_dim": 64}),
    "adamw": (adamw_steps, {"elements": 64 << 20}),
}


def add_parser(commands: Any) -> None:
    """Adds the subcommands."""
    for name, (run, sizes) in OPS.items():
        add = add_command(commands, name, (run.__doc__ or "").splitlines()[0], _run)
        add_sizes(add, **sizes)
        if name == "pool":
            add("--layers", [12, 1])
        else:
            add("--dtype", [tuple(DTYPES)], default=["fp32", "bf16"])
        add_options(add, rounds=15)
