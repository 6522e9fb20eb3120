"""The products of a rank, by shape, from the trace of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_samoe.planning.cluster import Cluster
from megatron_samoe.planning.recorder import Operation
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


def products_of(trace: Trace) -> tuple[Product, ...]:
    """Returns the products of a forward pass."""
    return tuple(_product(o) for o in trace.forward if o.kind == "product")


def _product(operation: Operation) -> Product:
    """Returns an operation as a product; the rows of grouped ones are those of a group on average."""
    groups, _, columns, inner = operation.shape
    rows = operation.flops / (2.0 * groups * columns * inner)
    return Product(rows, inner, columns, operation.dtype.itemsize, groups)
