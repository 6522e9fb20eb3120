"""`benchmark.py dispatch`, `pool`, `cross-entropy`, `adamw`: compiled ops against the same work in plain torch."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_samoe.benchmarks.common import CLOCKS, DTYPES, Rows, add_options, alternate, process_status_kb
from megatron_samoe.ops import extension
from megatron_samoe.ops.adamw import AdamWRates, AdamWRun, adamw
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.cross_entropy import cross_entropy_backward, cross_entropy_parts
from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate


def _need_extension() -> None:
    if not extension.load():
        raise SystemExit("There is nothing to compare: the compiled extension is not usable.")


def _row(name: str, dtype: str, medians: dict[str, float], first: str, **more: Any) -> dict[str, Any]:
    """Milliseconds of each contestant, and the first's speed over each other's."""
    ratios = {f"{first} / {other}": round(medians[other] / medians[first], 2) for other in medians if other != first}
    return {"op": name, "dtype": dtype, **{f"{k} ms": round(v * 1e3, 3) for k, v in medians.items()}, **ratios, **more}


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
    elif combine == "gather":
        inverse_TK = torch.argsort(order_N).view(-1, topk)
        y_TH = (rows_NH[inverse_TK] * probs_TK[..., None].to(rows_NH.dtype)).sum(dim=1)
    else:
        inverse_TK = torch.argsort(order_N).view(-1, topk)
        y_TH = functional.embedding_bag(inverse_TK, rows_NH, per_sample_weights=probs_TK.to(rows_NH.dtype), mode="sum")
    return y_TH, aux


def route_compiled(logits_TE: Tensor, x_TH: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Routing by the ops of this package."""
    gate = topk_gate(logits_TE, topk)
    permutation = make_permutation(gate.ids_TK, logits_TE.shape[1])
    y_TH = unpermute(permute(x_TH, permutation), gate.probs_TK, permutation)
    aux = (gate.score_sum_GE * gate.counts_GE).sum() / logits_TE.shape[0] ** 2
    return y_TH, aux


def _dispatch_variants(options: argparse.Namespace, dtype: str) -> dict[str, Callable[[], object]]:
    logits_TE = torch.randn(options.tokens, options.num_experts, requires_grad=True)
    x_TH = torch.randn(options.tokens, options.hidden_size).to(DTYPES[dtype]).requires_grad_()
    dy_TH = torch.randn(options.tokens, options.hidden_size).to(DTYPES[dtype])

    def both_ways(route: Callable[..., tuple[Tensor, Tensor]], *rest: str) -> None:
        y_TH, aux = route(logits_TE, x_TH, options.topk, *rest)
        torch.autograd.grad((y_TH, aux), (logits_TE, x_TH), (dy_TH, torch.ones(())))

    variants: dict[str, Callable[[], object]] = {"compiled": lambda: both_ways(route_compiled)}
    for way in ("index_add", "gather", "embedding_bag"):
        variants[way] = lambda way=way: both_ways(route_plain, way)
    return variants


def _dispatch_aside(options: argparse.Namespace, dtype: str, threads: int, connection: Any) -> None:
    torch.set_num_threads(threads)
    variants, clock = _dispatch_variants(options, dtype), CLOCKS[options.clock]
    for name in iter(connection.recv, None):
        started = clock()
        variants[name]()
        connection.send(clock() - started)


@contextmanager
def _as_it_comes(options: argparse.Namespace, dtype: str) -> Iterator[dict[str, Callable[[], object]]]:
    """Gives the plain variants in a process that frees memory as glibc does unless it is told otherwise."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_dispatch_aside, args=(options, dtype, torch.get_num_threads(), theirs))
    process.start()

    def ask(name: str) -> float:
        ours.send(name)
        seconds: float = ours.recv()
        return seconds

    try:
        yield {name: lambda name=name: ask(name) for name in _dispatch_variants(options, dtype) if name != "compiled"}
    finally:
        ours.send(None)
        process.join()


def dispatch(options: argparse.Namespace) -> Rows:
    """Softmax gate, permutation, weighted un-permutation of an expert that does nothing; forward and backward.

    The rows "as it comes" set ours, with freed memory kept as the pretrain program keeps it, against torch in a process
    that does not.
    """
    _need_extension()
    rows = []
    for dtype in options.dtype:
        variants = _dispatch_variants(options, dtype)
        with _as_it_comes(options, dtype) as plain:
            asked = {f"{name}, as it comes": run for name, run in plain.items()}
            medians = alternate({**variants, **asked}, options.rounds, options.clock)
        rows.append(_row("dispatch", dtype, {name: medians[name] for name in variants}, "compiled"))
        apart = {name: medians[f"{name}, as it comes"] for name in plain}
        rows.append(_row("dispatch, torch as it comes", dtype, {"compiled": medians["compiled"], **apart}, "compiled"))
    return rows


def pool(options: argparse.Namespace) -> Rows:
    """All layers' weights from the banks, and both gradients, against matrix products of the same."""
    _need_extension()
    banks_PGN = torch.randn(options.banks, 1, options.elements)
    rows = []
    for layers in options.layers:
        a_LGP = torch.randn(layers, 1, options.banks)
        out_LGN, dbanks_PGN = torch.empty(layers, 1, options.elements), torch.zeros_like(banks_PGN)
        dW_LGN = torch.randn(layers, 1, options.elements)
        a_LP, t_PN, dw_LN, dt_PN = a_LGP[:, 0], banks_PGN[:, 0], dW_LGN[:, 0], dbanks_PGN[:, 0]
        forward: dict[str, Callable[[], object]] = {
            "compiled": lambda a=a_LGP, out=out_LGN: combine_banks(a, banks_PGN, out),
            "matmul": lambda a=a_LP, t=t_PN, out=out_LGN: torch.matmul(a, t, out=out[:, 0]),
        }
        backward: dict[str, Callable[[], object]] = {
            "compiled": lambda a=a_LGP, dw=dW_LGN, db=dbanks_PGN: combine_banks_backward(a, banks_PGN, dw, db),
            "matmul": lambda a=a_LP, t=t_PN, dw=dw_LN, dt=dt_PN: (dt.addmm_(a.t(), dw), dw @ t.t()),
        }
        # Bytes that must move: banks and weights once; banks, their gradient (twice) and the layers' gradients once.
        units = {"forward": options.banks + layers, "backward": 3 * options.banks + layers}
        for name, variants in (("forward", forward), ("backward", backward)):
            variants["copy"] = lambda out=out_LGN, dw=dW_LGN: out.copy_(dw)
            medians = alternate(variants, options.rounds, options.clock)
            copied = 2 * layers / medians.pop("copy")
            moved = units[name] / medians["compiled"]
            share = {"share_of_copy_bandwidth": round(moved / copied, 3)}
            rows.append(_row(f"pool {name}, {layers} layers", "fp32", medians, "compiled", **share))
    return rows


def cross_entropy(options: argparse.Namespace) -> Rows:
    """Loss and gradient of logits over a vocabulary of GPT-2's size."""
    _need_extension()
    rows = []
    for dtype in options.dtype:
        logits_TV = torch.randn(options.tokens, options.vocab_size).to(DTYPES[dtype]).requires_grad_()
        labels_T = torch.randint(0, options.vocab_size, (options.tokens,))
        dloss_T = torch.full((options.tokens,), 1 / options.tokens)

        def compiled(logits_TV: Tensor = logits_TV, labels_T: Tensor = labels_T, dloss_T: Tensor = dloss_T) -> None:
            peak_T, sum_T, target_T = cross_entropy_parts(logits_TV, labels_T)
            logsumexp_T = sum_T.log() + peak_T
            assert (logsumexp_T - target_T).isfinite().all()
            cross_entropy_backward(logits_TV, labels_T, 0, logsumexp_T, dloss_T)

        def plain(logits_TV: Tensor = logits_TV, labels_T: Tensor = labels_T, dloss_T: Tensor = dloss_T) -> None:
            loss_T = functional.cross_entropy(logits_TV, labels_T, reduction="none")
            torch.autograd.grad(loss_T, logits_TV, dloss_T.to(loss_T.dtype))

        variants: dict[str, Callable[[], object]] = {"compiled": compiled, "torch": plain}
        memory = {f"{name} peak mb": _rise_of_peak(run) for name, run in variants.items()}
        medians = alternate(variants, options.rounds, options.clock)
        rows.append(_row("cross-entropy", dtype, medians, "compiled", **memory))
    return rows


def _rise_of_peak(run: Callable[[], object]) -> int | None:
    """Returns the MB by which a run raises the process's memory above what it holds now; None where that is not told."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the peak to the present
        before = process_status_kb("VmRSS")
        run()
        return (process_status_kb("VmHWM") - before) // 1024
    except OSError:
        return None


def adamw_steps(options: argparse.Namespace) -> Rows:
    """AdamW over so many elements in 64 tensors: fp32 weights, and bf16 weights with fp32 masters."""
    _need_extension()
    rows = []
    for dtype in options.dtype:
        sizes = [options.elements // 64] * 64
        masters = [torch.randn(n) for n in sizes]
        weights = [None if dtype == "fp32" else m.bfloat16() for m in masters]
        grads = [torch.randn(n) for n in sizes]
        runs = [
            AdamWRun(m, w, g, torch.zeros_like(m), torch.zeros_like(m))
            for m, w, g in zip(masters, weights, grads, strict=True)
        ]
        rates = AdamWRates(1e-4, 0.9, 0.95, 1e-8, 0.1)
        variants: dict[str, Callable[[], object]] = {"compiled": lambda runs=runs, rates=rates: adamw(runs, rates, 7)}
        for kind in ("fused", "foreach"):
            theirs = [m.clone().requires_grad_() for m in masters]
            for p, g in zip(theirs, grads, strict=True):
                p.grad = g
            optimizer = torch.optim.AdamW(theirs, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **{kind: True})

            def step(optimizer: Any = optimizer, theirs: Any = theirs, weights: Any = weights) -> None:
                optimizer.step()
                for w, p in zip(weights, theirs, strict=True):
                    if w is not None:
                        w.copy_(p.detach())

            variants[f"torch {kind}"] = step
            step()  # makes its moments
        memory = {f"{name} peak mb": _rise_of_peak(run) for name, run in variants.items()}
        copy = torch.empty(options.elements)
        source = torch.randn(options.elements)
        variants["copy"] = lambda a=copy, b=source: a.copy_(b)
        medians = alternate(variants, options.rounds, options.clock)
        copied = 8 * options.elements / medians.pop("copy")
        moved = (28 + (2 if dtype == "bf16" else 0)) * options.elements / medians["compiled"]
        share = {"share_of_copy_bandwidth": round(moved / copied, 3)}
        rows.append(_row("adamw", dtype, medians, "compiled", **share, **memory))
    return rows


def add_parser(commands: Any) -> None:
    """Adds the subcommands."""
    for name, run, sizes in (
        ("dispatch", dispatch, {"tokens": 8192, "hidden-size": 1024, "num-experts": 64, "topk": 2}),
        ("pool", pool, {"banks": 4, "elements": 32 << 20}),
        ("cross-entropy", cross_entropy, {"tokens": 2048, "vocab-size": 50_304}),
        ("adamw", adamw_steps, {"elements": 64 << 20}),
    ):
        parser = commands.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        parser.set_defaults(run=run)
        for option, size in sizes.items():
            parser.add_argument(f"--{option}", type=int, default=size)
        if name == "pool":
            parser.add_argument("--layers", type=int, nargs="+", default=[12, 1])
        else:
            parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
        add_options(parser, rounds=15)
