"""Rules of tensor, sequence, context, expert and data parallelism, and of pipeline stages."""

from __future__ import annotations

import math

from megatron_samoe.config.derived import (
    batch_sizes,
    data_parallel_size,
    dense_model_size,
    divisors,
    global_batch_size,
    num_micro_batches,
    parse_stage_layout,
    virtual_stages,
)
from megatron_samoe.config.option import flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Rule, Rules, Table

#: Of --moe-hierarchical-all-to-all.
ON_CPUS = "on CPUs hosts come first by themselves"


def _world(config: PretrainConfig, world_size: int) -> Rules:
    layout, size, above = config.parallel, 1, ""
    for name in ("pipeline_model_parallel_size", "tensor_model_parallel_size", "context_parallel_size"):
        ranks, free = getattr(layout, name), world_size // size
        allowed = (
            f"must divide the world of {world_size} ranks{above} (start a multiple of {size * ranks} processes, or set "
        )
        yield Rule(name, free % ranks, allowed + f"it to one of {divisors(free)})")
        if free % ranks:
            return  # what is cut from it would only repeat the complaint
        size *= ranks
        above += f" {'and' if above else 'over'} {flag(name)} {ranks}" if ranks > 1 else ""
    tp, pp, ep, etp = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
        layout.expert_tp,
    )
    yield Rule("expert_tensor_parallel_size", etp not in (1, tp), f"must be 1 or --tensor-model-parallel-size {tp}")
    if etp not in (1, tp):
        return
    over = f"over --expert-tensor-parallel-size {etp} and --pipeline-model-parallel-size {pp}"
    allowed = f"must divide the world of {world_size} ranks {over}: one of {divisors(max(world_size // (etp * pp), 1))}"
    yield Rule("expert_model_parallel_size", world_size % (etp * ep * pp), allowed)


def _matrices(config: PretrainConfig, _: int) -> Rules:
    model, moe, layout = config.model, config.moe, config.parallel
    tp, ep, etp = layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.expert_tp
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "ffn_hidden_size": model.mlp_size,
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "num_query_groups": model.num_query_groups if model.group_query_attention else 0,
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size or 0,
    }
    for name, size in sizes.items():
        yield Rule(name, size % tp, f"must be divisible by --tensor-model-parallel-size {tp}", size)
    if moe.expert_layout == "dense":
        yield Rule("expert_model_parallel_size", ep > 1, "must be 1 with --expert-layout dense")
        return
    common, width = math.gcd(*moe.expert_counts), config.expert_ffn_size
    allowed = f"must be divisible by --expert-model-parallel-size {ep}, which may be one of {divisors(common)}"
    yield Rule("num_experts", common % ep, allowed)
    yield Rule("moe_ffn_hidden_size", width % etp, f"must be divisible by --expert-tensor-parallel-size {etp}", width)
    if etp != tp:
        yield _divided_tokens(config, "--expert-tensor-parallel-size 1")
    local = moe.fewest_experts // ep
    if ep > 1 and not moe.fewest_experts % ep:
        allowed = f"must be at most the {local} experts that each of --expert-model-parallel-size {ep} ranks holds"
        yield Rule("moe_dispatch_chunks", layout.moe_dispatch_chunks > local, allowed)
    if config.shared_expert_size is None:
        allowed = "needs --moe-shared-expert-intermediate-size or --moe-residual-mlp"
        yield Rule("moe_shared_expert_overlap", layout.moe_shared_expert_overlap, allowed)
    if layout.moe_all_to_all_backend != "extension":
        allowed = f"needs --moe-all-to-all-backend extension, and CUDA: {ON_CPUS}"
        yield Rule("moe_hierarchical_all_to_all", layout.moe_hierarchical_all_to_all, allowed)


def _divided_tokens(config: PretrainConfig, cause: str) -> Rule:
    tp, cp = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    tokens = config.training.micro_batch_size * config.model.seq_length // cp
    over = f" over --context-parallel-size {cp}" if cp > 1 else ""
    allowed = (
        f"micro batch x sequence{over} = {tokens} tokens must be divisible by --tensor-model-parallel-size {tp} with "
    )
    return Rule("micro_batch_size", tokens % tp, allowed + cause)


def _sequence_parallel(config: PretrainConfig, _: int) -> Rules:
    if config.parallel.sequence_parallel:
        tp = config.parallel.tensor_model_parallel_size
        yield Rule("sequence_parallel", tp == 1, "needs --tensor-model-parallel-size above 1")
        yield _divided_tokens(config, "--sequence-parallel")


def _context_parallel(config: PretrainConfig, _: int) -> Rules:
    model, layout = config.model, config.parallel
    cp, tp, length = layout.context_parallel_size, layout.tensor_model_parallel_size, model.seq_length
    if cp == 1:
        return
    below = length // (2 * cp) * 2 * cp
    near = " or ".join(str(n) for n in (below, below + 2 * cp) if n)
    allowed = f"must be divisible by 2 x --context-parallel-size {cp} = {2 * cp}: {near}"
    yield Rule("seq_length", length % (2 * cp), allowed)
    yield Rule("attention_dropout", model.attention_dropout, "must be 0 with --context-parallel-size above 1")
    if layout.cp_comm_type == "p2p":
        allowed = f"needs --cp-comm-type a2a with --context-parallel-size {cp}, not p2p"
        yield Rule("sliding_window", model.sliding_window, allowed)
        yield Rule("attn_logit_softcapping", model.attn_logit_softcapping, allowed)
        yield Rule("softmax_type", model.softmax_type != "vanilla", allowed)
        yield Rule("reset_attention_mask", config.data.reset_attention_mask, allowed)
        return
    # All-to-alls give each context-parallel rank some of the heads of its tensor-parallel rank.
    name, heads = "num_attention_heads", model.num_attention_heads
    if model.group_query_attention and not model.multi_latent_attention:
        name, heads = "num_query_groups", model.num_query_groups
    if heads % tp == 0:
        allowed = f"needs {flag(name)} {heads} over --tensor-model-parallel-size {tp} to be divisible by "
        allowed += f"--context-parallel-size {cp}, which may be one of {divisors(heads // tp)}; p2p needs no such thing"
        yield Rule("cp_comm_type", heads // tp % cp, allowed)


def _batches(config: PretrainConfig, world_size: int) -> Rules:
    training = config.training
    if training.global_batch_size is None:
        allowed = "needs --global-batch-size: one that follows the number of ranks would change the course of training"
        yield Rule("elastic", config.parallel.elastic, allowed)
    if dense_model_size(config.parallel) > world_size:
        return
    dp, total = data_parallel_size(config, world_size), global_batch_size(config, world_size)
    per_pass, micro_batch = training.micro_batch_size * dp, training.micro_batch_size
    multiple = f"a multiple of --micro-batch-size {micro_batch} x data-parallel size {dp} = {per_pass}"
    yield Rule("global_batch_size", total % per_pass, f"must be {multiple}", total)
    if total % per_pass == 0:
        is_uneven = any(size % per_pass for size in batch_sizes(config, world_size))
        yield Rule("rampup_batch_size", is_uneven, f"must make each batch size {multiple}")
    # Loads of other micro-batches are not known when the first one's gradient is formed.
    allowed = f"must divide --micro-batch-size {micro_batch} x data-parallel size {dp}: one of {divisors(per_pass)}"
    for name in ("moe_aux_loss_group_size", "pool_lock_entropy_group_size"):
        yield Rule(name, per_pass % (getattr(config.moe, name) or 1), allowed)


def _stages(config: PretrainConfig, world_size: int) -> Rules:
    parallel, layers = config.parallel, config.model.num_layers
    pp, per_stage = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    layout = parallel.pipeline_model_parallel_layout
    if pp == 1 or world_size % dense_model_size(parallel):
        return
    if layout is not None:
        allowed = "excludes --pipeline-model-parallel-layout"
        yield Rule("num_layers_per_virtual_pipeline_stage", per_stage is not None, allowed)
        counts = parse_stage_layout(layout)
        allowed = f"has {sum(counts)} layers; --num-layers is {layers}"
        yield Rule("pipeline_model_parallel_layout", sum(counts) != layers, allowed)
        allowed = f"has {len(counts)} stages; a multiple of --pipeline-model-parallel-size {pp} is needed"
        yield Rule("pipeline_model_parallel_layout", len(counts) % pp, allowed)
    stages = virtual_stages(parallel, layers)
    if per_stage is None:
        allowed = f"must divide --num-layers {layers} (one of {divisors(layers)}), or give "
        yield Rule("pipeline_model_parallel_size", stages == 0, allowed + "--pipeline-model-parallel-layout")
    else:
        legal = [d for d in divisors(layers) if layers % (pp * d) == 0]
        allowed = f"times --pipeline-model-parallel-size {pp} must divide --num-layers {layers}: one of {legal}"
        yield Rule("num_layers_per_virtual_pipeline_stage", stages == 0, allowed)
    if stages > pp:
        yield from _virtual_stages(config, world_size)


def _virtual_stages(config: PretrainConfig, world_size: int) -> Rules:
    pp, total = config.parallel.pipeline_model_parallel_size, global_batch_size(config, world_size)
    micro_batches = num_micro_batches(config, world_size)
    schedule = config.parallel.pipeline_schedule
    yield Rule("pipeline_schedule", schedule == "gpipe", "has no virtual stages; use 1f1b")
    per_pass = config.training.micro_batch_size * data_parallel_size(config, world_size)
    in_steps = [size // per_pass for size in batch_sizes(config, world_size)]
    odd = next((number for number in in_steps if number % pp), 0)
    allowed = "micro-batches per step; interleaved virtual stages need a multiple of --pipeline-model-parallel-size "
    allowed += str(pp)
    if micro_batches % pp == 0:
        yield Rule("rampup_batch_size", odd, f"makes {odd} {allowed}")
    yield Rule("global_batch_size", micro_batches % pp, f"makes {micro_batches} {allowed}", total)


TABLES = (
    Table(("parallel",), _world),
    Table(("parallel", "model", "moe", "training"), _matrices),
    Table(("parallel", "model", "training"), _sequence_parallel),
    Table(("parallel", "model"), _context_parallel),
    Table(("parallel", "training", "moe"), _batches),
    Table(("parallel", "model", "training"), _stages),
)
