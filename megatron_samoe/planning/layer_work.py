"""What a rank computes in one layer for one micro-batch: its products by shape, and the bytes that pass through memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_samoe.models.layer_layout import LayerPlace
from megatron_samoe.planning.cluster import Cluster
from megatron_samoe.planning.description import Description
from megatron_samoe.planning.traces import Trace

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
        core_flops: forward operations of attention's core.
        kept_bytes: what autograd keeps.
    """

    products: tuple[Product, ...]
    core_flops: float
    kept_bytes: int
    is_moe: bool


@lru_cache(maxsize=1 << 14)
def layer_work(description: Description, place: LayerPlace, batch: int) -> LayerWork:
    """Returns the work of the layer at a place for a micro-batch of sequences."""
    trace = description.trace(place, batch)
    return LayerWork(forward_products(trace), trace.core_flops, trace.kept_bytes, place.num_experts > 0)


def forward_products(trace: Trace) -> tuple[Product, ...]:
    """Returns the products of a forward pass."""
    shapes = [(o.shape, o.dtype.itemsize) for o in trace.forward if o.kind == "product"]
    return tuple(Product(rows, inner, columns, size, groups) for (groups, rows, columns, inner), size in shapes)
