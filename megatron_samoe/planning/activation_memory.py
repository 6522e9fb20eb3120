"""Bytes of activations that autograd keeps, and the workspace of passes, from traces of one layer of each kind."""

from __future__ import annotations

from megatron_samoe.config.derived import group_tokens
from megatron_samoe.models.gpt_stage import recomputed_layers
from megatron_samoe.models.rank_model import compute_dtype
from megatron_samoe.planning.description import PlannedModel


def activation_bytes(planned: PlannedModel, stage: int, micro_batches: int) -> int:
    """Returns the bytes of activations at a stage's peak: all passes in flight, and what the output layer takes or, when the
    backward pass has come through that, a layer's backward pass, with its forward pass where that is done again."""
    config, grid, plans = planned.config, planned.grid, planned.stages.chunks_of_stage[stage]
    parallel, training = config.parallel, config.training
    tokens, batch = group_tokens(config), training.micro_batch_size
    passes = passes_in_flight(parallel.pipeline_schedule, grid.pp, stage, len(plans), micro_batches)
    local_tokens = tokens // grid.tp if parallel.sequence_parallel else tokens
    inputs = local_tokens * config.model.hidden_size * compute_dtype(config).itemsize
    workspace = planned.lending_costs(planned.first_rank_of(stage)).workspace
    all_chunks = in_backward = 0
    for spec, again, count in planned.stages.counts(stage, recomputed_layers(config)):
        trace = planned.description.trace(spec, batch, training.recompute_granularity == "selective", worst=True)
        kept, most = trace.kept_bytes, trace.backward_peak
        if again:
            kept, most = inputs, max(most, trace.forward_peak)
        all_chunks += count * kept
        in_backward = max(in_backward, most - kept + (workspace if spec.num_experts else 0))
    kept = passes * (all_chunks // len(plans) + (inputs if grid.pp > 1 else 0))
    if any(plan.has_head for plan in plans):
        # A teacher's logits are compared with the student's, so both are kept.
        fuses_loss = training.fused_linear_cross_entropy and config.distillation.teacher is None
        head = planned.description.head_trace(batch, fuses_loss)
        waiting = passes - 1 if parallel.pipeline_schedule == "gpipe" else 0
        kept += waiting * head.kept_bytes
        in_backward = max(in_backward, head.forward_peak, head.backward_peak)
    return kept + in_backward


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
