"""Times the compiled ops against the same work in plain torch, alternating in one process; prints medians and ratios.

    python tools/benchmark_ops.py                      # all, 2 threads
    python tools/benchmark_ops.py --only route --threads 1 --dtype bf16

Routing is softmax gate, permutation, un-permutation with an expert that does nothing, forward and backward. Page faults
of fresh memory can cost more than all of it: run once as it is, once under the allocator settings of docs/extension.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_samoe.ops import extension
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.cross_entropy import cross_entropy_backward, cross_entropy_parts
from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median time of each function in ms; one call of each, in turn, per repeat."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


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
    gate = topk_gate(logits_TE, topk)
    permutation = make_permutation(gate.ids_TK, logits_TE.shape[1])
    y_TH = unpermute(permute(x_TH, permutation), gate.probs_TK, permutation)
    aux = (gate.score_sum_GE * gate.counts_GE).sum() / logits_TE.shape[0] ** 2
    return y_TH, aux


def time_route(args: argparse.Namespace) -> dict[str, float]:
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    logits_TE = torch.randn(args.tokens, args.experts, requires_grad=True)
    x_TH = torch.randn(args.tokens, args.hidden).to(dtype).requires_grad_()
    dy_TH = torch.randn(args.tokens, args.hidden).to(dtype)

    def both_ways(route: Callable[[], tuple[Tensor, Tensor]]) -> None:
        y_TH, aux = route()
        torch.autograd.grad((y_TH, aux), (logits_TE, x_TH), (dy_TH, torch.ones(())))

    functions: dict[str, Callable[[], object]] = {
        "compiled": lambda: both_ways(lambda: route_compiled(logits_TE, x_TH, args.topk))
    }
    for combine in ("index_add", "gather", "embedding_bag"):
        functions[combine] = lambda combine=combine: both_ways(lambda: route_plain(logits_TE, x_TH, args.topk, combine))
    return alternate(functions, args.repeats)


def time_parts(args: argparse.Namespace) -> dict[str, float]:
    """Forward of each part, with a copy of the same rows as the yardstick."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    logits_TE = torch.randn(args.tokens, args.experts)
    x_TH = torch.randn(args.tokens, args.hidden).to(dtype)
    gate = topk_gate(logits_TE, args.topk)
    permutation = make_permutation(gate.ids_TK, args.experts)
    rows_NH = permute(x_TH, permutation)
    out_NH = torch.empty_like(rows_NH)
    ops = torch.ops.megatron_samoe
    saved = (rows_NH, gate.probs_TK, permutation.slot_of_row_N, permutation.row_of_slot_TK)
    return alternate(
        {
            "copy of the rows": lambda: out_NH.copy_(rows_NH),
            "gate": lambda: topk_gate(logits_TE, args.topk),
            "gate in torch": lambda: torch.topk(torch.softmax(logits_TE, dim=1), args.topk, dim=1),
            "make_permutation": lambda: make_permutation(gate.ids_TK, args.experts),
            "argsort in torch": lambda: torch.argsort(gate.ids_TK.flatten(), stable=True),
            "permute": lambda: permute(x_TH, permutation),
            "unpermute": lambda: unpermute(rows_NH, gate.probs_TK, permutation),
            "unpermute backward": lambda: ops.unpermute_backward(x_TH, *saved),
        },
        args.repeats,
    )


def time_combine(args: argparse.Namespace) -> dict[str, float]:
    banks_PGN = torch.randn(args.banks, 1, args.elements)
    coefficients_LGP = torch.randn(args.layers, 1, args.banks)
    out_LGN, dbanks_PGN = torch.empty(args.layers, 1, args.elements), torch.zeros_like(banks_PGN)
    dW_LGN = torch.randn(args.layers, 1, args.elements)
    out_bf16 = torch.empty_like(out_LGN, dtype=torch.bfloat16)
    a_LP, t_PN, dw_LN, dt_PN = coefficients_LGP[:, 0], banks_PGN[:, 0], dW_LGN[:, 0], dbanks_PGN[:, 0]
    return alternate(
        {
            "forward": lambda: combine_banks(coefficients_LGP, banks_PGN, out_LGN),
            "forward to bf16": lambda: combine_banks(coefficients_LGP, banks_PGN, out_bf16),
            "forward, torch.matmul": lambda: torch.matmul(a_LP, t_PN, out=out_LGN[:, 0]),
            "backward": lambda: combine_banks_backward(coefficients_LGP, banks_PGN, dW_LGN, dbanks_PGN),
            "backward, two matmuls": lambda: (dt_PN.addmm_(a_LP.t(), dw_LN), dw_LN @ t_PN.t()),
            "copy of the layers": lambda: out_LGN.copy_(dW_LGN),
        },
        max(3, args.repeats // 3),
    )


def time_cross_entropy(args: argparse.Namespace) -> dict[str, float]:
    """Loss and gradient of logits over a vocabulary of GPT-2's size."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    logits_TV = torch.randn(args.tokens // 4, 50_304).to(dtype).requires_grad_()
    labels_T = torch.randint(0, 50_257, (args.tokens // 4,))
    dloss_T = torch.full((args.tokens // 4,), 1 / args.tokens)

    def compiled() -> Tensor:
        peak_T, sum_T, target_T = cross_entropy_parts(logits_TV, labels_T)
        logsumexp_T = sum_T.log() + peak_T
        assert (logsumexp_T - target_T).isfinite().all()
        return cross_entropy_backward(logits_TV, labels_T, 0, logsumexp_T, dloss_T)

    def plain() -> Tensor:
        loss_T = functional.cross_entropy(logits_TV, labels_T, reduction="none")
        return torch.autograd.grad(loss_T, logits_TV, dloss_T.to(loss_T.dtype))[0]

    return alternate({"compiled": compiled, "torch": plain}, max(3, args.repeats // 2))


TIMERS = {"route": time_route, "parts": time_parts, "combine": time_combine, "cross_entropy": time_cross_entropy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(TIMERS), nargs="*", default=list(TIMERS))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--banks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--elements", type=int, default=32 << 20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if not extension.load():
        raise SystemExit("There is nothing to compare: the compiled extension is not usable.")
    report = {name: {k: round(v, 3) for k, v in TIMERS[name](args).items()} for name in args.only}
    print(json.dumps({"arguments": vars(args), "milliseconds": report, "build": extension.build_info()}, indent=1))


if __name__ == "__main__":
    main()
