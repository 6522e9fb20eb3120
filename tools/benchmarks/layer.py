"""An MoE layer, forward and backward, against bare products and other programs' layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

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
from megatron_samoe.moe.types import ForwardContext, MoELayerSpec
from megatron_samoe.parallel_state import ParallelState, single_process_state
from tools.benchmarks.harness import DTYPES, Dtype, Row, Rows, Variants, speed
from tools.benchmarks.peers import LineWorker, PeerBenchmark

Activation = Literal["gelu", "swiglu"]
PEERS = {"gelu": ["loop_gelu", "deepspeed", "tutel"], "swiglu": ["loop_swiglu", "hf_grouped", "torchtitan"]}


@dataclass(frozen=True)
class LayerShape:
    """What a layer is given, and of what size it is."""

    tokens: int
    hidden_size: int
    ffn_hidden_size: int
    num_experts: int
    topk: int
    activation: Activation = "gelu"
    dtype: torch.dtype = torch.float32

    @property
    def num_rows(self) -> int:
        """Rows that experts compute."""
        return self.tokens * self.topk

    @property
    def up_size(self) -> int:
        """Columns of an expert's first product."""
        return self.ffn_hidden_size * (2 if self.activation == "swiglu" else 1)

    def config(self) -> PretrainConfig:
        """Returns a model with such a layer."""
        gated, ffn = self.activation == "swiglu", self.ffn_hidden_size
        form: dict[str, Any] = {"swiglu": gated, "disable_bias_linear": gated, "num_attention_heads": 8}
        model = ModelConfig(hidden_size=self.hidden_size, ffn_hidden_size=ffn, **form)
        moe = MoEConfig("moe", num_experts=self.num_experts, moe_router_topk=self.topk, moe_ffn_hidden_size=ffn)
        return PretrainConfig(model=model, moe=moe)


def make_layer(shape: LayerShape, state: ParallelState, dispatch_chunks: int = 1) -> Callable[[], None]:
    """Returns a run of a layer's forward and backward on random tokens."""
    forward, backward = make_halves(shape, state, dispatch_chunks)
    return lambda: backward(forward())


def make_halves(
    shape: LayerShape, state: ParallelState, dispatch_chunks: int = 1
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    """Returns a layer's forward on random tokens, and the backward from its result, on the device of the state."""
    config = shape.config()
    spec = MoELayerSpec(0, 0, expert_shape(config, all_layers(config)[0]), router_init_std=0.02)
    router = Router(config.moe, spec, AuxiliaryLosses(config.moe, state.dp), state, shape.dtype)
    layer = MoELayer(spec, router, OwnExperts(spec.shape, state, shape.dtype), None, state, dispatch_chunks)
    lender = OwnLender({0: layer.experts})
    parameters = dict(layer.named_parameters())
    initialize_parameters(parameters, state, seed=1)
    buffers = GradBuffers(parameters, state)
    x_TH, dy_TH = (torch.randn(shape.tokens, shape.hidden_size, device=state.device).to(shape.dtype) for _ in range(2))
    x_TH.requires_grad_()
    context = ForwardContext(1, training=True, tokens_per_step=shape.tokens)

    def forward() -> Tensor:
        assert buffers is not None  # parameters know them by a weak reference only
        y_TH: Tensor = layer(x_TH, context, lender)[0]
        return y_TH

    def backward(y_TH: Tensor) -> None:
        torch.autograd.backward(y_TH, dy_TH)
        x_TH.grad = None

    return forward, backward


#: A product's operands, and where its result goes.
Product = tuple[Tensor, Tensor, Tensor]


def mlp_products(shape: LayerShape) -> dict[str, list[Product]]:
    """Returns the six products of a layer's experts by kind, one per expert each, into tensors that exist."""
    hidden, ffn, up = shape.hidden_size, shape.ffn_hidden_size, shape.up_size
    total, count = shape.num_rows, shape.num_experts
    kinds: dict[str, list[Product]] = {}
    for n in (total // count + (i < total % count) for i in range(count)):  # spread evenly
        sizes = ((n, hidden), (up, hidden), (n, up), (hidden, ffn), (n, ffn), (n, hidden))
        a, b, c, d, e, y = (torch.randn(size, dtype=shape.dtype) for size in sizes)
        made = {
            "first product": (a, b.t(), c.clone()),
            "second product": (e, d.t(), y.clone()),
            "gradient of activations": (y, d, e.clone()),
            "gradient of rows": (c, b, a.clone()),
            "gradient of w1": (c.t(), a, b.clone()),
            "gradient of w2": (y.t(), e, d.clone()),
        }
        for kind, product in made.items():
            kinds.setdefault(kind, []).append(product)
    return kinds


def multiply(products: Iterable[Product]) -> None:
    """Makes products one after another, as torch does."""
    for left, right, out in products:
        torch.mm(left, right, out=out)


def products(shape: LayerShape) -> Callable[[], None]:
    """Returns a run of a layer's products, an expert at a time, as a layer without grouped products would."""
    by_expert = zip(*mlp_products(shape).values(), strict=True)
    return partial(multiply, [product for expert in by_expert for product in expert])


@dataclass(frozen=True, kw_only=True)
class MoELayerBenchmark(PeerBenchmark):
    """one MoE layer, forward and backward

    "products" are the layer's expert products alone as torch runs them, an expert at a time into tensors that exist, the
    weights' gradients not added to anything; "dense" are the six products of one dense MLP with as many rows.
    """

    name = "moe-layer"

    tokens: int = 4096
    activation: tuple[Activation, ...] = ("gelu",)
    hidden_size: int = 512
    ffn_hidden_size: int = 2048
    num_experts: tuple[int, ...] = (8,)
    topk: tuple[int, ...] = (1,)
    dtype: tuple[Dtype, ...] = ("fp32",)

    def rows(self) -> Rows:
        if self.peers and self.clock == "cpu":
            raise ConfigError("--clock", "cpu", "wall, with --peers: other processes cannot be timed so")
        sizes = {"T": self.tokens, "H": self.hidden_size, "F": self.ffn_hidden_size}
        rows = []
        for activation in self.activation:
            with self.running("w1_moe_layer.py", PEERS[activation], sizes) as peers:
                for dtype, experts, topk in itertools.product(self.dtype, self.num_experts, self.topk):
                    layer = self.tokens, self.hidden_size, self.ffn_hidden_size, experts, topk
                    shape = LayerShape(*layer, activation, DTYPES[dtype])
                    rows.append(self._row(shape, dtype, peers))
                    print(rows[-1], flush=True)
        return rows

    def _row(self, shape: LayerShape, dtype: str, peers: list[LineWorker]) -> Row:
        """Returns GFLOP/s of expert products for each contestant, and ratios."""
        variants: Variants = {
            "layer": make_layer(shape, single_process_state()),
            "products": products(shape),
            "dense": products(replace(shape, num_experts=1)),
        }
        asked = {}
        for peer in peers:
            facts = peer.ask(f"build {dtype} {shape.num_experts} {shape.topk}")
            if "err" in facts:
                print(f"{peer.name}: {facts['err']}")
            else:
                asked[peer.name] = peer.seconds
        medians = self.medians({**variants, **asked})
        flops = 3 * 2 * shape.num_rows * shape.hidden_size * (shape.up_size + shape.ffn_hidden_size)
        best = {"best peer": min(medians[name] for name in asked)} if asked else {}
        return {
            "experts": shape.num_experts,
            "topk": shape.topk,
            "activation": shape.activation,
            "dtype": dtype,
            **{f"{name} GFLOP:s": round(flops / seconds / 1e9, 1) for name, seconds in medians.items()},
            **speed(medians | best, "layer", "products", *best, digits=3),
        }
