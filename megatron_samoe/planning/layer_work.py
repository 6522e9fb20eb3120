"""What a rank computes in one layer for one micro-batch: its products by shape, and the bytes that pass through memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_samoe.models.layer_layout import LayerPlace
from megatron_samoe.models.transformer_layer import TransformerLayer
from megatron_samoe.planning.cluster import Cluster
from megatron_samoe.planning.description import Description
from megatron_samoe.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, TokenWiseLinear

#: Bytes of a weight's gradient in fp32 that a backward pass reads and writes.
GRADIENT_BYTES = 8


@dataclass(frozen=True)
class Product:
    """`groups` products of [rows, inner] by [inner, columns]."""

    rows: float
    inner: int
    columns: int
    element_bytes: int
    groups: int = 1

    @property
    def flops(self) -> float:
        """Multiply-adds x 2."""
        return 2.0 * self.groups * self.rows * self.inner * self.columns

    def seconds(self, cluster: Cluster, forwards: float, backwards: float, peak: float | None = None) -> float:
        """Returns the seconds of passes: operations at the speed of large products, and all operands through memory.

        So a product whose shortest side is as long as the GPU does FLOPs while it moves a byte reaches half of that speed.
        """
        rate = (peak or cluster.flops) * cluster.efficiency
        weight, tokens = self.inner * self.columns, self.rows * (self.inner + self.columns)
        forward = self.element_bytes * (weight + tokens)
        backward = self.element_bytes * (weight + 2 * tokens) + GRADIENT_BYTES * weight
        moved = self.groups * cluster.product_traffic * (forwards * forward + backwards * backward)
        return (forwards + 2 * backwards) * self.flops / rate + moved / cluster.memory_bandwidth


@dataclass(frozen=True)
class LayerWork:
    """The work of a layer on one rank, for the tokens of a micro-batch.

    Attributes:
        other_flops: forward operations in products that have no shape here, of parts from outside the package.
        core_flops: forward operations of attention's core.
        kept_bytes: what autograd keeps.
    """

    products: tuple[Product, ...]
    other_flops: float
    core_flops: float
    kept_bytes: int
    is_moe: bool


@lru_cache(maxsize=1 << 14)
def layer_work(description: Description, place: LayerPlace, tokens: int, element_bytes: int, tp: int) -> LayerWork:
    """Returns the work of the layer at a place.

    Args:
        tokens: those that a tensor-parallel group works on together.
    """
    layer = description.layer(place)
    products = (*_linear_products(layer, tokens, element_bytes), *_expert_products(layer, tokens, element_bytes, tp))
    core = tokens * layer.attention.core_flops_per_token() / tp
    whole = tokens * layer.flops_per_token() / tp
    other = max(0.0, whole - core - sum(product.flops for product in products))
    return LayerWork(products, other, core, description.kept_bytes(place, tokens, False), layer.is_moe)


def _linear_products(layer: TransformerLayer, tokens: int, size: int) -> list[Product]:
    """Returns the products of all linear layers, with this rank's part of the weight."""
    products = []
    own_tokens = tokens // layer.state.tp.size if layer.state.sequence_parallel else tokens
    for module in layer.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, TokenWiseLinear)):
            weight, rows = module.weight, own_tokens if isinstance(module, TokenWiseLinear) else tokens
            products.append(Product(rows, weight.shape[-1], weight.numel() // weight.shape[-1], size))
    return products


def _expert_products(layer: TransformerLayer, tokens: int, size: int, tp: int) -> list[Product]:
    """Returns the router's product and those of evenly loaded experts, whoever owns them."""
    if not layer.is_moe:
        return []
    moe, state = layer.moe, layer.state
    shape, local = moe.shape, moe.shape.num_experts // state.ep.size
    routed = tokens if state.etp.size == tp else tokens // tp
    rows = routed * moe.router.experts_per_token / local
    inner = shape.ffn_size // state.etp.size
    up = (2 if shape.activation == "swiglu" else 1) * inner
    router = Product(tokens // tp, shape.hidden_size, shape.num_experts, size)
    experts = [Product(rows, shape.hidden_size, up, size, local), Product(rows, inner, shape.hidden_size, size, local)]
    return [router, *experts]
