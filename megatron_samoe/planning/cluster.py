"""The machines of a cluster as the planner's model of time sees them, and the speed of exchanges between their GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_samoe.parallel_state.rank_grid import GROUPS, RankGrid


@dataclass(frozen=True)
class Cluster:
    """Machines of a cluster, and what a program makes of them. Defaults leave out what nobody has measured.

    Attributes:
        gpus_per_node: GPUs whose links have `intra_bandwidth`; an NVL72 rack counts as a node of 64.
        memory_bytes: bytes of one GPU's memory that tensors may fill.
        flops: peak FLOPs per second of one GPU's matrix products, in the precision of training.
        intra_bandwidth, inter_bandwidth: bytes per second that one GPU sends inside its node, and to other nodes.
        memory_bandwidth: bytes per second of one GPU's memory.
        efficiency: share of `flops` that large products reach.
        latency_s: seconds of one hop of a collective.
        attention_efficiency: share of `flops` that attention's core reaches; that of products if None.
        attention_width: heads that are narrower take as long for each score as heads of this width.
        fp32_share: rate of products in fp32 over `flops` (H100: 67 of 989 TFLOP/s, A100: 19.5 of 312).
        product_flops: peak of the layers' products where these have a lower precision than the rest; `flops` if None.
        product_traffic: how often a product moves its operands and result through memory: what small products wait for.
        activation_traffic: how often each byte that autograd keeps moves through memory, forwards and backwards.
        moe_traffic: how many times as often in MoE layers, whose tokens are permuted.
        expert_row_bytes: further bytes that a row of an expert moves, forwards and backwards, where the program does not
            fuse operations on experts' biases and activations.
        layer_launch_s, moe_launch_s: seconds that a host needs to launch a pass of a dense and of an MoE layer.
        launches_ahead: hosts launch while their GPUs compute, so that only who is slower counts; a processor does both in turn.
        ranks_per_processor: ranks that share a processor: while one waits, the others run faster.
        step_s: further seconds of a step, whatever its size.
        link_efficiency: share of the links' bandwidth that exchanges reach.
        tensor_exposed, expert_exposed: share of the exchanges between tensor- and expert-parallel ranks that no product
            hides; below 1 also where experts' rows have a faster way than collectives have.
        sharded_exchange: time of a reduce-scatter and an all-gather over that of an all-reduce of the same bytes: 1 in rings
            of NCCL, 2 with gloo, whose reduce-scatter sums everything everywhere.
        gradient_bytes: bytes of a gradient's element as data-parallel ranks sum it.
        gathers_ahead: weights of sharded optimizers are gathered during the first micro-batch's forward pass.
        sends_once: a token goes once to each rank, and once to each node, that has experts for it (DeepEP).
        spread: an interval holds 90 % of known runs if it ends at (1 + spread) times, and at 1 / (1 + spread) of, the time.
    """

    world_size: int
    gpus_per_node: int
    memory_bytes: float
    flops: float
    intra_bandwidth: float
    inter_bandwidth: float
    memory_bandwidth: float = 2e12
    efficiency: float = 0.45
    latency_s: float = 1e-5
    attention_efficiency: float | None = None
    attention_width: int = 0
    fp32_share: float = 1 / 15
    product_flops: float | None = None
    product_traffic: float = 0.0
    activation_traffic: float = 0.0
    moe_traffic: float = 1.0
    expert_row_bytes: float = 0.0
    layer_launch_s: float = 0.0
    moe_launch_s: float = 0.0
    launches_ahead: bool = True
    ranks_per_processor: float = 1.0
    step_s: float = 0.0
    link_efficiency: float = 1.0
    tensor_exposed: float = 1.0
    expert_exposed: float = 1.0
    sharded_exchange: float = 1.0
    gradient_bytes: float = 4.0
    gathers_ahead: bool = False
    sends_once: bool = False
    spread: float = 0.0

    def attention_flops(self, head_dim: int) -> float:
        """Returns the FLOPs per second of attention's core with heads of a width."""
        share = self.efficiency if self.attention_efficiency is None else self.attention_efficiency
        return self.flops * share * min(1.0, head_dim / max(self.attention_width, 1))


@dataclass(frozen=True)
class Links:
    """Times of exchanges in the named groups of a grid."""

    grid: RankGrid
    cluster: Cluster

    def size(self, name: str) -> int:
        """Returns the number of a group's members."""
        return self.grid.size_and_rank(name, 0)[0]

    def members_in_node(self, name: str) -> int:
        """Returns how many members of a group share the first one's node."""
        axes_grid, varying = GROUPS[name]
        stride, members = 1, 1
        for axis, size in self.grid.axes(axes_grid).items():
            if axis in varying:
                members *= max(1, min(size, self.cluster.gpus_per_node // stride))
            stride *= size
        return min(members, self.size(name))

    def bandwidth(self, name: str) -> float:
        """Returns the bytes per second of a ring through the group."""
        inside = self.members_in_node(name) == self.size(name)
        links = self.cluster.intra_bandwidth if inside else self.cluster.inter_bandwidth
        return links * self.cluster.link_efficiency

    def seconds(self, name: str, sent_bytes: float) -> float:
        """Returns the seconds to send bytes along a ring."""
        hops = max(1, math.ceil(math.log2(max(self.size(name), 2))))
        return sent_bytes / self.bandwidth(name) + self.cluster.latency_s * hops

    def gather(self, name: str, whole_bytes: float) -> tuple[float, float]:
        """Returns (seconds, bytes sent) of an all-gather or reduce-scatter."""
        size = self.size(name)
        if size == 1:
            return 0.0, 0.0
        sent = whole_bytes * (size - 1) / size
        return self.seconds(name, sent), sent

    def all_to_all(self, name: str, own_bytes: float) -> tuple[float, float]:
        """Returns (seconds, bytes sent) of an even all-to-all of `own_bytes` per rank; both kinds of link work at once."""
        size, near = self.size(name), self.members_in_node(name)
        if size == 1:
            return 0.0, 0.0
        part = own_bytes / size
        return self._both((near - 1) * part, (size - near) * part)

    def dispatch(self, name: str, token_bytes: float, choices: float) -> tuple[float, float]:
        """Returns (seconds, bytes sent) of sending tokens to the ranks of the experts that they chose.

        Args:
            token_bytes: of all tokens of a rank, each counted once.
            choices: experts of a token, spread evenly.
        """
        size, near = self.size(name), self.members_in_node(name)
        if size == 1 or not self.cluster.sends_once:
            return self.all_to_all(name, token_bytes * choices)
        nodes = size // near

        def visited(others: int, all_of_them: int) -> float:
            return others * (1 - (1 - 1 / all_of_them) ** choices) if others else 0.0

        return self._both(visited(near - 1, size) * token_bytes, visited(nodes - 1, nodes) * token_bytes)

    def _both(self, inside: float, outside: float) -> tuple[float, float]:
        c = self.cluster
        seconds = max(inside / c.intra_bandwidth, outside / c.inter_bandwidth) / c.link_efficiency
        return seconds + c.latency_s, inside + outside
