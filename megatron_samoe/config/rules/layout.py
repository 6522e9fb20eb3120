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
from megatron_samoe.config.rules import Rows, Table

#: Of --moe-hierarchical-all-to-all.
ON_CPUS = "on CPUs hosts come first by themselves"


def _world(config: PretrainConfig, world_size: int) -> Rows:
    layout, size, above = config.parallel, 1, ""
    for name in ("pipeline_model_parallel_size", "tensor_model_parallel_size", "context_parallel_size"):
        ranks, free = getattr(layout, name), world_size // size
        allowed = (
            f"must divide the world of {world_size} ranks{above} (start a multiple of {size * ranks} processes, or set "
        )
        yield name, free % ranks, allowed + f"it to one of {divisors(free)})"
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
    is_other = etp not in (1, tp)
    yield "expert_tensor_parallel_size", is_other, f"must be 1 or --tensor-model-parallel-size {tp}"
    over = f"over --expert-tensor-parallel-size {etp} and --pipeline-model-parallel-size {pp}"
    allowed = f"must divide the world of {world_size} ranks {over}: one of {divisors(max(world_size // (etp * pp), 1))}"
    yield "expert_model_parallel_size", not is_other and world_size % (etp * ep * pp), allowed


def _matrices(config: PretrainConfig, _: int) -> Rows:
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
        yield name, size % tp, f"must be divisible by --tensor-model-parallel-size {tp}", size
    is_dense = moe.expert_layout == "dense"
    yield "expert_model_parallel_size", is_dense and ep > 1, "must be 1 with --expert-layout dense"
    if is_dense:
        return
    common, width = math.gcd(*moe.expert_counts), config.expert_ffn_size
    allowed = f"must be divisible by --expert-model-parallel-size {ep}, which may be one of {divisors(common)}"
    yield "num_experts", common % ep, allowed
    yield "moe_ffn_hidden_size", width % etp, f"must be divisible by --expert-tensor-parallel-size {etp}", width
    yield _divided_tokens(config, "--expert-tensor-parallel-size 1", etp != tp)
    chunks, local = layout.moe_dispatch_chunks, moe.fewest_experts // ep
    is_over = ep > 1 and not moe.fewest_experts % ep and chunks > local
    allowed = f"must be at most the {local} experts that each of --expert-model-parallel-size {ep} ranks holds"
    yield "moe_dispatch_chunks", is_over, allowed
    is_idle = layout.moe_shared_expert_overlap and config.shared_expert_size is None
    yield "moe_shared_expert_overlap", is_idle, "needs --moe-shared-expert-intermediate-size or --moe-residual-mlp"
    is_plain = layout.moe_hierarchical_all_to_all and layout.moe_all_to_all_backend != "extension"
    yield "moe_hierarchical_all_to_all", is_plain, f"needs --moe-all-to-all-backend extension, and CUDA: {ON_CPUS}"


def _divided_tokens(config: PretrainConfig, cause: str, divides: bool) -> tuple[str, object, str]:
    tp, cp = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    tokens = config.training.micro_batch_size * config.model.seq_length // cp
    over = f" over --context-parallel-size {cp}" if cp > 1 else ""
    allowed = (
        f"micro batch x sequence{over} = {tokens} tokens must be divisible by --tensor-model-parallel-size {tp} with "
    )
    return "micro_batch_size", divides and tokens % tp, allowed + cause


def _sequence_parallel(config: PretrainConfig, _: int) -> Rows:
    is_on = config.parallel.sequence_parallel
    is_alone = config.parallel.tensor_model_parallel_size == 1
    yield "sequence_parallel", is_on and is_alone, "needs --tensor-model-parallel-size above 1"
    yield _divided_tokens(config, "--sequence-parallel", is_on)


def _context_parallel(config: PretrainConfig, _: int) -> Rows:
    model, layout = config.model, config.parallel
    cp, tp, length = layout.context_parallel_size, layout.tensor_model_parallel_size, model.seq_length
    if cp == 1:
        return
    below = length // (2 * cp) * 2 * cp
    near = " or ".join(str(n) for n in (below, below + 2 * cp) if n)
    yield "seq_length", length % (2 * cp), f"must be divisible by 2 x --context-parallel-size {cp} = {2 * cp}: {near}"
    yield "attention_dropout", model.attention_dropout, "must be 0 with --context-parallel-size above 1"
    if layout.cp_comm_type == "p2p":
        allowed = f"needs --cp-comm-type a2a with --context-parallel-size {cp}, not p2p"
        yield "sliding_window", model.sliding_window, allowed
        yield "attn_logit_softcapping", model.attn_logit_softcapping, allowed
        yield "softmax_type", model.softmax_type != "vanilla", allowed
        yield "reset_attention_mask", config.data.reset_attention_mask, allowed
        return
    # All-to-alls give each context-parallel rank some of the heads of its tensor-parallel rank.
    is_grouped = model.group_query_attention and not model.multi_latent_attention
    name, heads = "num_attention_heads", model.num_attention_heads
    if is_grouped:
        name, heads = "num_query_groups", model.num_query_groups
    allowed = (
        f"needs {flag(name)} {heads} over --tensor-model-parallel-size {tp} to be divisible by --context-parallel-size "
    )
    allowed += f"{cp}, which may be one of {divisors(heads // tp)}; p2p needs no such thing"
    yield "cp_comm_type", heads % tp == 0 and heads // tp % cp, allowed


def _batches(config: PretrainConfig, world_size: int) -> Rows:
    training = config.training
    is_elastic = config.parallel.elastic and training.global_batch_size is None
    allowed = "needs --global-batch-size: one that follows the number of ranks would change the course of training"
    yield "elastic", is_elastic, allowed
    if dense_model_size(config.parallel) > world_size:
        return
    dp, total = data_parallel_size(config, world_size), global_batch_size(config, world_size)
    per_pass, micro_batch = training.micro_batch_size * dp, training.micro_batch_size
    multiple = f"a multiple of --micro-batch-size {micro_batch} x data-parallel size {dp} = {per_pass}"
    yield "global_batch_size", total % per_pass, f"must be {multiple}", total
    is_odd = total % per_pass == 0 and any(size % per_pass for size in batch_sizes(config, world_size))
    yield "rampup_batch_size", is_odd, f"must make each batch size {multiple}"
    # Loads of other micro-batches are not known when the first one's gradient is formed.
    allowed = f"must divide --micro-batch-size {micro_batch} x data-parallel size {dp}: one of {divisors(per_pass)}"
    for name in ("moe_aux_loss_group_size", "pool_lock_entropy_group_size"):
        yield name, per_pass % (getattr(config.moe, name) or 1), allowed


def _stages(config: PretrainConfig, world_size: int) -> Rows:
    parallel, layers = config.parallel, config.model.num_layers
    pp, per_stage = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    layout = parallel.pipeline_model_parallel_layout
    if pp == 1 or world_size % dense_model_size(parallel):
        return
    if layout is not None:
        allowed = "excludes --pipeline-model-parallel-layout"
        yield "num_layers_per_virtual_pipeline_stage", per_stage is not None, allowed
        counts = parse_stage_layout(layout)
        allowed = f"has {sum(counts)} layers; --num-layers is {layers}"
        yield "pipeline_model_parallel_layout", sum(counts) != layers, allowed
        allowed = f"has {len(counts)} stages; a multiple of --pipeline-model-parallel-size {pp} is needed"
        yield "pipeline_model_parallel_layout", len(counts) % pp, allowed
    stages = virtual_stages(parallel, layers)
    is_whole = per_stage is None
    allowed = f"must divide --num-layers {layers} (one of {divisors(layers)}), or give --pipeline-model-parallel-layout"
    yield "pipeline_model_parallel_size", stages == 0 and is_whole, allowed
    legal = [d for d in divisors(layers) if layers % (pp * d) == 0]
    allowed = f"times --pipeline-model-parallel-size {pp} must divide --num-layers {layers}: one of {legal}"
    yield "num_layers_per_virtual_pipeline_stage", stages == 0 and not is_whole, allowed
    if stages > pp:
        yield from _virtual_stages(config, world_size)


def _virtual_stages(config: PretrainConfig, world_size: int) -> Rows:
    pp, total = config.parallel.pipeline_model_parallel_size, global_batch_size(config, world_size)
    micro_batches = num_micro_batches(config, world_size)
    is_gpipe = config.parallel.pipeline_schedule == "gpipe"
    yield "pipeline_schedule", is_gpipe, "has no virtual stages; use 1f1b"
    per_pass = config.training.micro_batch_size * data_parallel_size(config, world_size)
    in_steps = [size // per_pass for size in batch_sizes(config, world_size)]
    odd = next((number for number in in_steps if number % pp), 0)
    allowed = (
        f"micro-batches per step; interleaved virtual stages need a multiple of --pipeline-model-parallel-size {pp}"
    )
    yield "rampup_batch_size", micro_batches % pp == 0 and odd, f"makes {odd} {allowed}"
    yield "global_batch_size", micro_batches % pp, f"makes {micro_batches} {allowed}", total


TABLES = (
    Table(("parallel",), _world),
    Table(("parallel", "model", "moe", "training"), _matrices),
    Table(("parallel", "model", "training"), _sequence_parallel),
    Table(("parallel", "model"), _context_parallel),
    Table(("parallel", "training", "moe"), _batches),
    Table(("parallel", "model", "training"), _stages),
)
