"""Bytes of activations that autograd keeps, from what the modules say of themselves; checked against what it does keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.models.gpt_stage import is_recomputed
from megatron_samoe.models.layer_layout import StagePlan
from megatron_samoe.models.rank_model import compute_dtype
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.planning.description import describe, shared_parameters


def activation_bytes(
    config: PretrainConfig, vocab_size: int, grid: RankGrid, pipeline_rank: int, plans: Sequence[StagePlan],
    micro_batches: int,
) -> int:  # fmt: skip
    """Returns the activations at a stage's peak: all passes in flight, one layer's recomputed ones, and the head's.

    Args:
        plans: of the stage's chunks.
    """
    parallel, description = config.parallel, describe(config, vocab_size)
    tokens = config.training.micro_batch_size * config.model.seq_length
    passes = passes_in_flight(parallel.pipeline_schedule, grid.pp, pipeline_rank, len(plans), micro_batches)
    layers = Counter((x.num_experts, is_recomputed(config, i)) for p in plans for i, x in enumerate(p.layers))
    places = {x.num_experts: x for p in plans for x in p.layers}
    whole = {kind: description.layer(place).kept_bytes(tokens) for kind, place in places.items()}
    local_tokens = tokens // grid.tp if parallel.sequence_parallel else tokens
    inputs = local_tokens * config.model.hidden_size * compute_dtype(config).itemsize
    all_chunks = sum(n * (inputs if again else whole[kind]) for (kind, again), n in layers.items())
    boundary = inputs if grid.pp > 1 else 0
    kept = passes * (all_chunks // len(plans) + boundary)
    recomputed = max((whole[kind] for kind, again in layers if again), default=0)
    head = sum(description.ends(p).head_kept_bytes(tokens) for p in plans if p.has_head)
    heads = passes if parallel.pipeline_schedule == "gpipe" else 1
    return kept + recomputed + head * heads + _layer_mode_workspace(config, vocab_size, grid)


def passes_in_flight(schedule: str, pp: int, rank: int, num_chunks: int, num_micro_batches: int) -> int:
    """Returns the most passes whose activations a stage holds at once, without making the plan.

    1F1B: min(pp - rank, m); GPipe: m; interleaved (arXiv:2104.04473): its warm-up 2 (pp - rank - 1) + (chunks - 1) pp
    and one more, or all where there are only pp micro-batches.
    """
    if pp == 1:
        return 1
    if num_chunks > 1:
        total = num_chunks * num_micro_batches
        warmup = total if num_micro_batches == pp else 2 * (pp - rank - 1) + (num_chunks - 1) * pp
        return min(warmup + 1, total)
    return num_micro_batches if schedule == "gpipe" else min(pp - rank, num_micro_batches)


def _layer_mode_workspace(config: PretrainConfig, vocab_size: int, grid: RankGrid) -> int:
    """One layer's combined experts and their gradients, which layer mode makes in its backward."""
    if not config.moe.has_pool or config.moe.samoe_combine != "layer":
        return 0
    banks = shared_parameters(config, vocab_size, grid, 0)
    one_layer = sum(p.whole_numel for p in banks) // config.moe.num_expert_banks
    return one_layer * (compute_dtype(config).itemsize + 4)
