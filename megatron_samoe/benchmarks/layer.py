"""`benchmark.py moe-layer`: an MoE layer, forward and backward, against bare products and other programs' layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.benchmarks.common import DTYPES, Row, Rows, add_command, add_options, alternate
from megatron_samoe.benchmarks.peers import LineWorker, add_peer_options, running
from megatron_samoe.cli.arguments import Options
from megatron_samoe.config import ModelConfig, MoEConfig, PretrainConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.blueprint import expert_shape
from megatron_samoe.models.initialize import initialize_parameters
from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.moe.balance import AuxiliaryLosses
from megatron_samoe.moe.moe_layer import MoELayer
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.sharing.own import OwnExperts, OwnLender
from megatron_samoe.moe.types import ForwardContext, MoEPlace
from megatron_samoe.parallel_state import ParallelState, single_process_state

PEERS = {"gelu": ["loop_gelu", "deepspeed", "tutel"], "swiglu": ["loop_swiglu", "hf_grouped", "torchtitan"]}


def run(options: Options) -> Rows:
    """An MoE layer, forward and backward with all gradients.

    "products" are the layer's expert products alone as torch runs them, an expert at a time into tensors that exist, the
    weights' gradients not added to anything; "dense" are the six products of one dense MLP with as many rows.
    """
    if options.peers and options.clock == "cpu":
        raise ConfigError("--clock", "cpu", "wall, with --peers: other processes cannot be timed so")
    sizes = {"T": options.tokens, "H": options.hidden_size, "F": options.ffn_hidden_size}
    rows = []
    for activation in options.activation:
        with running(options, "w1_moe_layer.py", PEERS[activation], sizes) as peers:
            for dtype, experts, topk in itertools.product(options.dtype, options.num_experts, options.topk):
                rows.append(measure(options, experts, topk, activation, dtype, peers))
                print(rows[-1], flush=True)
    return rows


def make_layer(
    options: Options, experts: int, topk: int, activation: str, dtype: torch.dtype, state: ParallelState,
    dispatch_chunks: int = 1,
) -> Callable[[], None]:  # fmt: skip
    """Returns a run of a layer's forward and backward on random tokens."""
    forward, backward = make_halves(options, experts, topk, activation, dtype, state, dispatch_chunks)
    return lambda: backward(forward())


def make_halves(
    options: Options, experts: int, topk: int, activation: str, dtype: torch.dtype, state: ParallelState,
    dispatch_chunks: int = 1,
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:  # fmt: skip
    """Returns a layer's forward on random tokens, and the backward from its result, on the device of the state."""
    gated, tokens = activation == "swiglu", options.tokens
    config = PretrainConfig(
        model=ModelConfig(hidden_size=options.hidden_size, ffn_hidden_size=options.ffn_hidden_size,
                          num_attention_heads=8, swiglu=gated, disable_bias_linear=gated),
        moe=MoEConfig(expert_layout="moe", num_experts=experts, moe_router_topk=topk,
                      moe_ffn_hidden_size=options.ffn_hidden_size),
    )  # fmt: skip
    place = MoEPlace(0, 0, expert_shape(config, all_layers(config)[0]), router_init_std=0.02)
    router = Router(config.moe, place, AuxiliaryLosses(config.moe, state.dp), state, dtype)
    layer = MoELayer(place, router, OwnExperts(place.shape, state, dtype), None, state, dispatch_chunks)
    lender = OwnLender({0: layer.experts})
    parameters = dict(layer.named_parameters())
    initialize_parameters(parameters, state, seed=1)
    buffers = GradBuffers(parameters, state)
    x_TH, dy_TH = (torch.randn(tokens, options.hidden_size, device=state.device).to(dtype) for _ in range(2))
    x_TH.requires_grad_()
    context = ForwardContext(1, training=True, tokens_per_step=tokens)

    def forward() -> Tensor:
        assert buffers is not None  # parameters know them by a weak reference only
        y_TH: Tensor = layer(x_TH, context, lender)[0]
        return y_TH

    def backward(y_TH: Tensor) -> None:
        torch.autograd.backward(y_TH, dy_TH)
        x_TH.grad = None

    return forward, backward


def measure(
    options: Options, experts: int, topk: int, activation: str, dtype_name: str, peers: list[LineWorker]
) -> Row:
    """Returns one row: GFLOP/s of expert products for each contestant, and ratios."""
    hidden, ffn, dtype = options.hidden_size, options.ffn_hidden_size, DTYPES[dtype_name]
    width = 2 * ffn if activation == "swiglu" else ffn
    num_rows = options.tokens * topk
    variants: dict[str, Callable[[], object]] = {
        "layer": make_layer(options, experts, topk, activation, dtype, single_process_state()),
        "products": products(split_evenly(num_rows, experts), hidden, width, ffn, dtype),
        "dense": products([num_rows], hidden, width, ffn, dtype),
    }
    for peer in peers:
        facts = peer.ask(f"build {dtype_name} {experts} {topk}")
        if "err" in facts:
            print(f"{peer.name}: {facts['err']}")
        else:
            variants[peer.name] = peer.seconds
    medians = alternate(variants, options.rounds, options.clock)
    flops = 3 * 2 * num_rows * hidden * (width + ffn)
    ratios = {"layer / products": medians["products"] / medians["layer"]}
    others = [medians[peer.name] for peer in peers if peer.name in medians]
    if others:
        ratios["layer / best peer"] = min(others) / medians["layer"]
    return {
        "experts": experts, "topk": topk, "activation": activation, "dtype": dtype_name,
        **{f"{name} GFLOP:s": round(flops / seconds / 1e9, 1) for name, seconds in medians.items()},
        **{name: round(value, 3) for name, value in ratios.items()},
    }  # fmt: skip


def split_evenly(total: int, parts: int) -> list[int]:
    """Returns sizes that sum to the total and differ by one at most."""
    return [total // parts + (i < total % parts) for i in range(parts)]


#: A product's operands, and where its result goes.
Product = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def mlp_products(rows: list[int], hidden: int, width: int, ffn: int, dtype: torch.dtype) -> dict[str, list[Product]]:
    """Returns an MLP's six products by kind, one per expert each, into tensors that exist."""
    kinds: dict[str, list[Product]] = {}
    for n in rows:
        shapes = ((n, hidden), (width, hidden), (n, width), (hidden, ffn), (n, ffn), (n, hidden))
        a, b, c, d, e, y = (torch.randn(shape, dtype=dtype) for shape in shapes)
        made = {
            "first product": (a, b.t(), c.clone()), "second product": (e, d.t(), y.clone()),
            "gradient of activations": (y, d, e.clone()), "gradient of rows": (c, b, a.clone()),
            "gradient of w1": (c.t(), a, b.clone()), "gradient of w2": (y.t(), e, d.clone()),
        }  # fmt: skip
        for kind, product in made.items():
            kinds.setdefault(kind, []).append(product)
    return kinds


def multiply(products: Iterable[Product]) -> None:
    """Makes products one after another, as torch does."""
    for left, right, out in products:
        torch.mm(left, right, out=out)


def products(rows: list[int], hidden: int, width: int, ffn: int, dtype: torch.dtype) -> Callable[[], None]:
    """Returns a run of an MLP's six products per expert."""
    kinds = mlp_products(rows, hidden, width, ffn, dtype)
    # An expert at a time, as a layer without grouped products would.
    return partial(multiply, [product for expert in zip(*kinds.values(), strict=True) for product in expert])


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    add = add_command(commands, "moe-layer", "one MoE layer, forward and backward", run)
    add("--tokens", 4096)
    add("--activation", [tuple(PEERS)], default=["gelu"])
    add("--hidden-size", 512)
    add("--ffn-hidden-size", 2048)
    add("--num-experts", [8])
    add("--topk", [1])
    add("--dtype", [tuple(DTYPES)], default=["fp32"])
    add_peer_options(add)
    add_options(add)
