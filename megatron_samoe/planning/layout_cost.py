"""A closed-form model of a training step in a layout: its time, and the bytes that each rank sends.

    step = (m + (pp - 1) / chunks) * slowest stage's micro-batch + ramp + gradients + pool + optimizer

A micro-batch's time is its products by shape, attention, what passes through memory, waits for the host, and what of the
exchanges nothing hides (`Cluster` has the constants). Collectives are rings: all-gather and reduce-scatter of n bytes
send n (g - 1) / g, an all-reduce twice that. A group inside one node has the node's bandwidth, any other the network's.
An all-to-all is split between both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_samoe.config.derived import group_tokens, num_micro_batches
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.models.gpt_stage import recomputed_layers
from megatron_samoe.models.rank_model import compute_dtype
from megatron_samoe.models.transformer_layer import TransformerLayer
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.planning.cluster import Cluster, Links
from megatron_samoe.planning.description import PlannedModel
from megatron_samoe.planning.layer_work import products_of
from megatron_samoe.planning.muon import flops_of_rank, matrices_of
from megatron_samoe.planning.teacher import planned_teacher
from megatron_samoe.planning.traces import Trace

#: AdamW reads gradient, master and two moments and writes the last three and the weight: bytes per element it updates.
OPTIMIZER_TRAFFIC_BYTES = 30

#: Parts of a step of which a forward pass is a third; of the others it is half.
COMPUTED = ("products", "attention", "memory")


@dataclass
class Cost:
    """The cost of a step: seconds by part, and bytes that the busiest rank sends by kind."""

    seconds: dict[str, float] = field(default_factory=dict)
    sent_bytes: dict[str, float] = field(default_factory=dict)

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    @property
    def largest(self) -> tuple[str, float]:
        """The part that takes longest, and its share of the step."""
        part = max(self.seconds, key=lambda name: self.seconds[name])
        return part, self.seconds[part] / self.step_s

    def add(self, part: str, seconds: float, sent_bytes: float | None = None) -> None:
        """Adds seconds, and bytes sent, to a part."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        if sent_bytes is not None:
            self.sent_bytes[part] = self.sent_bytes.get(part, 0.0) + sent_bytes


def step_cost(config: PretrainConfig, vocab_size: int, cluster: Cluster) -> Cost:
    """Returns the cost of one optimizer step of a legal configuration."""
    planned = PlannedModel(config, vocab_size, cluster.world_size)
    grid = planned.grid
    links = Links(grid, cluster)
    number = num_micro_batches(config, cluster.world_size)
    slowest = _slowest_micro_batch(planned, links)
    teacher = planned_teacher(config, vocab_size, cluster.world_size)
    if teacher is not None:
        _add_forward(slowest, _slowest_micro_batch(teacher, links))
    cost = Cost()
    for part, seconds in slowest.seconds.items():
        cost.add(part, number * seconds, number * slowest.sent_bytes[part] if part in slowest.sent_bytes else None)
    chunks = len(planned.stages.chunks_of_stage[0])
    if grid.pp > 1:
        # Stages that wait leave their processors to others: if a processor has a rank of each stage, no time is lost.
        idle = max(0.0, grid.pp - cluster.ranks_per_processor)
        cost.add("bubble", idle / chunks * sum(slowest.seconds.values()))
        boundary = _residual_elements(config, grid) * compute_dtype(config).itemsize
        # Sends overlap with the passes; what remains is their way through the empty pipeline, there and back.
        ramp = 2 * (grid.pp - 1) * links.seconds("pp", boundary)
        # Of two stages one has no way on, and the other none back.
        cost.add("pipeline", ramp, (2 * chunks - (grid.pp == 2)) * number * boundary)
    _end_of_step(cost, planned, links)
    if config.parallel.overlap_grad_reduce and "gradients" in cost.seconds:
        # Reduced during the last micro-batch's backward pass, which is two thirds of it.
        pass_s, exchange_s = sum(slowest.seconds.values()) / 3, cost.seconds["gradients"]
        gathered = compute_dtype(config).itemsize if config.parallel.use_distributed_optimizer else 0.0
        gather_s = exchange_s * gathered / (cluster.gradient_bytes + gathered)
        hidden_s = min(exchange_s - gather_s, 2 * pass_s) + (min(gather_s, pass_s) if cluster.gathers_ahead else 0.0)
        cost.add("gradients", -hidden_s)
    return cost


def _micro_batch(planned: PlannedModel, stage: int, links: Links) -> Cost:
    """Returns the cost of one micro-batch in one stage, forwards and backwards."""
    config, plans, description = planned.config, planned.stages.chunks_of_stage[stage], planned.description
    cost, batch, cluster = Cost(), config.training.micro_batch_size, links.cluster
    selective = config.training.recompute_granularity == "selective"
    for spec, again, count in planned.stages.counts(stage, recomputed_layers(config)):
        layer, trace = description.layer(spec), description.trace(spec, batch, selective)
        passes = 3 if again else 2
        _layer_seconds(cost, config, layer, trace, links, count, passes - 1, (selective or again) + 1)
        _tensor_exchanges(cost, config, links, _tensor_regions(config, layer.is_moe, links.grid) * count * passes)
        _context_exchanges(cost, config, trace, links, count, again)
        if layer.is_moe:
            _expert_exchanges(cost, config, layer, links, count * passes)
    # Embeddings are summed on the way in, and gradients of the head's input on the way back.
    _tensor_exchanges(cost, config, links, sum(plan.has_embedding + plan.has_head for plan in plans))
    if any(plan.has_head for plan in plans):
        head = description.head_trace(batch, config.training.fused_linear_cross_entropy)
        cost.add("products", sum(product.seconds(cluster, 1, 1) for product in products_of(head)))
        cost.add("memory", cluster.activation_traffic * head.kept_bytes / cluster.memory_bandwidth)
    return cost


def _layer_seconds(
    cost: Cost,
    config: PretrainConfig,
    layer: TransformerLayer,
    trace: Trace,
    links: Links,
    count: int,
    forwards: int,
    cores: int,
) -> None:
    """Adds a micro-batch's passes through layers: what they compute, what they move, and how long they wait for hosts.

    Args:
        count: layers.
        forwards, cores: forward passes of a layer, and of its attention's core.
    """
    cluster, is_moe = links.cluster, layer.is_moe
    peak = cluster.product_flops or cluster.flops
    products = sum(product.seconds(cluster, forwards, 1, peak) for product in products_of(trace))
    attention = (cores + 2) * _core_seconds(trace.core_flops, config, cluster)
    # Of a forward and a backward pass, the former moves a third.
    traffic = cluster.activation_traffic * (cluster.moe_traffic if is_moe else 1.0)
    rows = _expert_tokens(config, links.grid) * layer.moe.router.experts_per_token if is_moe else 0.0
    moved = traffic * trace.kept_bytes + rows * cluster.expert_row_bytes
    memory = moved * (forwards + 2) / 3 / cluster.memory_bandwidth
    launches = (forwards + 1) * (cluster.moe_launch_s if is_moe else cluster.layer_launch_s)
    host = max(0.0, launches - products - attention - memory) if cluster.launches_ahead else launches
    for part, seconds in (("products", products), ("attention", attention), ("memory", memory), ("host", host)):
        cost.add(part, count * seconds)


def _core_seconds(flops: float, config: PretrainConfig, cluster: Cluster) -> float:
    """Returns the seconds of operations of attention's core."""
    model = config.model
    return flops / cluster.attention_flops(model.query_dim if model.multi_latent_attention else model.head_dim)


def _slowest_micro_batch(planned: PlannedModel, links: Links) -> Cost:
    """Returns the cost of one micro-batch in the stage where it takes longest."""
    stages = [_micro_batch(planned, stage, links) for stage in planned.stages.distinct]
    return max(stages, key=lambda stage: sum(stage.seconds.values()))


def _add_forward(cost: Cost, both: Cost) -> None:
    """Adds the forward pass of a micro-batch that is not recomputed: a third of what is computed, half of its exchanges."""
    for part, seconds in both.seconds.items():
        share = 1 / 3 if part in COMPUTED else 1 / 2
        cost.add(part, share * seconds, share * both.sent_bytes[part] if part in both.sent_bytes else None)


def _residual_elements(config: PretrainConfig, grid: RankGrid) -> int:
    tokens = group_tokens(config) // (grid.tp if config.parallel.sequence_parallel else 1)
    return tokens * config.model.hidden_size


def _tensor_regions(config: PretrainConfig, is_moe: bool, grid: RankGrid) -> float:
    """Returns the all-reduces of a layer in each pass."""
    regions = 1.0  # attention
    if not is_moe or config.shared_expert_size is not None:
        regions += 1.0
    if is_moe:
        if grid.etp == grid.tp:
            regions += 1.0
        elif not config.parallel.sequence_parallel:
            regions += 0.5  # one gather of the shares, no sum
    return regions


def _tensor_exchanges(cost: Cost, config: PretrainConfig, links: Links, number: float) -> None:
    """Adds all-reduces between tensor-parallel ranks (or gathers and scatters, which send as much)."""
    if links.grid.tp == 1:
        return
    complete = group_tokens(config) * config.model.hidden_size * compute_dtype(config).itemsize
    seconds, sent = links.gather("tp", complete)
    kind = links.cluster.sharded_exchange if config.parallel.sequence_parallel else 1.0
    cost.add("tensor", 2 * number * seconds * kind * links.cluster.tensor_exposed, 2 * number * sent)


def _context_exchanges(cost: Cost, config: PretrainConfig, trace: Trace, links: Links, count: int, again: bool) -> None:
    """Adds what attention exchanges between context-parallel ranks, and the routers' logits. Keys and values go round during
    the core's products: what these do not hide takes time.
    """
    operations = [o for part in (trace.forward, trace.backward, trace.forward if again else ()) for o in part]
    exchanges = [o for o in operations if o.group == "cp"]
    ring = [o.sent_bytes for o in exchanges if o.name == "shift"]
    if ring:
        core_flops = sum(o.flops for o in operations if o.kind == "attention")
        core_s = _core_seconds(core_flops, config, links.cluster)
        exposed = max(0.0, sum(ring) / links.bandwidth("cp") - core_s) + len(ring) * links.cluster.latency_s
        cost.add("context", count * exposed, count * sum(ring))
    for o in exchanges:
        if o.name == "all_to_all":
            seconds, sent = links.all_to_all("cp", o.read_bytes)
            cost.add("context", count * seconds, count * sent)
        elif o.name != "shift":
            cost.add("context", count * links.seconds("cp", o.sent_bytes), count * o.sent_bytes)


def _expert_tokens(config: PretrainConfig, grid: RankGrid) -> int:
    """Returns the tokens that a rank sends to experts: with unsplit ones, its share of those of its tensor-parallel group."""
    return group_tokens(config) // (1 if grid.etp == grid.tp else grid.tp)


def _expert_exchanges(cost: Cost, config: PretrainConfig, layer: TransformerLayer, links: Links, passes: int) -> None:
    """Adds dispatch and return in each pass."""
    grid = links.grid
    if grid.ep == 1:
        return
    token_bytes = _expert_tokens(config, grid) * config.model.hidden_size * compute_dtype(config).itemsize
    seconds, sent = links.dispatch("ep", token_bytes, layer.moe.router.experts_per_token)
    seconds *= links.cluster.expert_exposed
    cost.add("expert", 2 * passes * seconds, 2 * passes * sent)


def _end_of_step(cost: Cost, planned: PlannedModel, links: Links) -> None:
    """Adds reduction, update, gathering of weights and banks, and the pool's combination and contraction."""
    config, memory_s = planned.config, 1.0 / links.cluster.memory_bandwidth
    exchanges, updated = _exchanges(planned, links)
    for kind, (seconds, sent) in exchanges.items():
        cost.add(kind, seconds, sent)
    cost.add("optimizer", updated * OPTIMIZER_TRAFFIC_BYTES * memory_s)
    if links.cluster.step_s:
        cost.add("host", links.cluster.step_s)
    if config.optimizer.optimizer == "muon":
        cost.add("muon", *max(_muon(planned, stage, links) for stage in planned.stages.distinct))
    moved = fold_bytes(planned, num_micro_batches(config, links.cluster.world_size))
    if moved:
        cost.add("fold", moved * memory_s)


def _muon(planned: PlannedModel, stage: int, links: Links) -> tuple[float, float]:
    """Returns (seconds, bytes sent) of making a stage's matrices orthogonal, with their way to owners and back in fp32."""
    config, grid, rank = planned.config, links.grid, planned.first_rank_of(stage)
    found = matrices_of(planned, rank)
    share = 1.0 if config.optimizer.muon_ns_dtype == "bf16" else links.cluster.fp32_share
    flops = flops_of_rank(found, config.optimizer, grid, rank)
    costs = [(flops / (links.cluster.flops * share * links.cluster.efficiency), 0.0)]
    for m in found:
        group, full = m.tag.gradient_group, 4.0 * (m.numel if m.tag.slice is None else math.prod(m.tag.slice.shape))
        if m.tag.slice is not None or config.parallel.use_distributed_optimizer:
            costs += 2 * [links.all_to_all(group, full / links.size(group))]
        else:
            costs.append(links.gather(group, full))
        if m.split is not None:
            costs += 2 * [links.all_to_all(m.split, full / links.size(group))]
    seconds, sent = map(sum, zip(*costs, strict=True))
    return seconds, sent


def _exchanges(planned: PlannedModel, links: Links) -> tuple[Mapping[str, tuple[float, float]], float]:
    """Returns, for the slowest stage, (seconds, bytes sent) of gradients with weights and of the pool, and the largest
    number of elements that a rank updates.
    """
    zero = planned.config.parallel.use_distributed_optimizer
    worst: Mapping[str, tuple[float, float]] = {}
    updated = 0.0
    for stage in planned.stages.distinct:
        rank = planned.first_rank_of(stage)
        moved: dict[tuple[str, str, bool], float] = {}
        elements = 0.0
        for p in planned.parameters(rank):
            if not p.is_trained:
                continue
            group, is_sliced = p.tag.gradient_group, p.tag.slice is not None
            size = links.grid.size_and_rank(group, rank)[0]
            is_shared = zero and size > 1
            elements += p.shard_numel / size if is_sliced or is_shared else p.shard_numel
            kind = ("pool" if p.tag.shard.family == "pool" else "gradients", group, is_shared)
            if not is_sliced:
                # Gradients are summed, or each rank updates a slice and weights are gathered.
                summed = links.cluster.gradient_bytes
                more = p.shard_numel * (summed + p.element_bytes if is_shared else 2 * summed)
                moved[kind] = moved.get(kind, 0.0) + more
        for group, sent in planned.lending_costs(rank).sent.items():
            moved["pool", group, False] = moved.get(("pool", group, False), 0.0) + sent
        times: dict[str, tuple[float, float]] = {}
        for (what, group, is_shared), sent in moved.items():
            # A buffer holds many tensors, so that none has a latency of its own.
            size = links.grid.size_and_rank(group, rank)[0]
            passed, (seconds, before) = sent * (size - 1) / size, times.get(what, (0.0, 0.0))
            as_long = links.cluster.sharded_exchange if is_shared else 1.0
            times[what] = (seconds + as_long * passed / links.bandwidth(group), before + passed)
        if sum(t for t, _ in times.values()) >= sum(t for t, _ in worst.values()):
            worst = times
        updated = max(updated, elements)
    return worst, updated


def fold_bytes(planned: PlannedModel, micro_batches: int) -> float:
    """Returns the bytes that lending shared experts moves through a rank's memory in a step, on the busiest stage."""
    costs = [planned.lending_costs(planned.first_rank_of(stage)) for stage in planned.stages.distinct]
    return max(cost.traffic_per_step + micro_batches * cost.traffic_per_pass for cost in costs)
