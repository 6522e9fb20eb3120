"""Bytes of activations that autograd keeps, from the modules' `kept_bytes`; tests compare them with what it does keep."""

from __future__ import annotations

from megatron_samoe.config.derived import group_tokens
from megatron_samoe.models.gpt_stage import recomputed_layers
from megatron_samoe.models.rank_model import compute_dtype
from megatron_samoe.planning.description import PlannedModel


def activation_bytes(planned: PlannedModel, stage: int, micro_batches: int) -> int:
    """Returns the bytes of activations at a stage's peak: all passes in flight, and either the head's or, when the backward
    pass has come through that, one recomputed layer's and what a layer exchanges with context-parallel ranks."""
    config, grid, plans = planned.config, planned.grid, planned.stages.chunks_of_stage[stage]
    parallel, description = config.parallel, planned.description
    tokens = group_tokens(config)
    passes = passes_in_flight(parallel.pipeline_schedule, grid.pp, stage, len(plans), micro_batches)
    selective = config.training.recompute_granularity == "selective"
    counts = planned.stages.counts(stage, recomputed_layers(config))
    layers = [(description.kept_bytes(place, tokens, selective), again, n) for place, again, n in counts]
    local_tokens = tokens // grid.tp if parallel.sequence_parallel else tokens
    inputs = local_tokens * config.model.hidden_size * compute_dtype(config).itemsize
    all_chunks = sum(n * (inputs if again else whole) for whole, again, n in layers)
    boundary = inputs if grid.pp > 1 else 0
    kept = passes * (all_chunks // len(plans) + boundary)
    recomputed = max((whole for whole, again, _ in layers if again), default=0)
    # A teacher's logits are compared with the student's, so both are kept.
    fuses_loss = config.training.fused_linear_cross_entropy and config.distillation.teacher is None
    head = sum(description.ends(p).head_kept_bytes(tokens, fuses_loss) for p in plans if p.has_head)
    heads = passes if parallel.pipeline_schedule == "gpipe" else 1
    exchanged = max((description.layer(place).exchange_bytes(tokens) for place, _, _ in counts), default=0)
    at_a_time = max(head * heads, head * (heads - 1) + recomputed + exchanged)
    return kept + at_a_time + planned.lending_costs(planned.first_rank_of(stage)).workspace


def passes_in_flight(schedule: str, pp: int, rank: int, num_chunks: int, num_micro_batches: int) -> int:
    """Returns the largest number of passes whose activations a stage holds at once, without making the plan.

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
