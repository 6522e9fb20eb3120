"""Rules of tensor, sequence, context, expert and data parallelism; pipeline.py has those of stages."""

from __future__ import annotations

import math

from megatron_samoe.config.batch_schedule import batch_sizes
from megatron_samoe.config.derived import (
    data_parallel_size,
    dense_model_size,
    divisors,
    flag,
    global_batch_size,
)
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Problems
from megatron_samoe.errors import ConfigError


def _world_divides(config: PretrainConfig, world_size: int) -> Problems:
    parallel = config.parallel
    tp, pp, cp = (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    )  # fmt: skip
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tp
    if min(tp, cp, ep, etp, pp) < 1:
        return
    if world_size % pp:
        yield ConfigError("--pipeline-model-parallel-size", pp, f"must divide the world of {world_size} ranks "
                          f"(start a multiple of {pp} processes, or set it to one of {divisors(world_size)})")  # fmt: skip
        return
    if world_size % (tp * pp):
        # Expert groups of a layout that does not fit would only repeat the complaint.
        over = f" over --pipeline-model-parallel-size {pp}" if pp > 1 else ""
        yield ConfigError("--tensor-model-parallel-size", tp, f"must divide the world of {world_size} ranks{over} "
                          f"(start a multiple of {tp * pp} processes, or set it to one of {divisors(world_size // pp)})")  # fmt: skip
        return
    if world_size % (tp * cp * pp):
        others = f"--tensor-model-parallel-size {tp} and --pipeline-model-parallel-size {pp}"
        yield ConfigError("--context-parallel-size", cp, f"must divide the world of {world_size} ranks over {others} (start a "
                          f"multiple of {tp * cp * pp} processes, or set it to one of {divisors(world_size // (tp * pp))})")  # fmt: skip
        return
    if etp not in (1, tp):
        yield ConfigError("--expert-tensor-parallel-size", etp, f"must be 1 or --tensor-model-parallel-size {tp}")
    elif world_size % (etp * ep * pp):
        yield ConfigError("--expert-model-parallel-size", ep, f"must divide the world of {world_size} ranks over "
                          f"--expert-tensor-parallel-size {etp} and --pipeline-model-parallel-size {pp}: "
                          f"one of {divisors(max(world_size // (etp * pp), 1))}")  # fmt: skip


def _matrices_divide(config: PretrainConfig, world_size: int) -> Problems:
    model, moe, parallel = config.model, config.moe, config.parallel
    tp, ep, etp = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size, parallel.expert_tp
    if min(tp, ep, etp) < 1:
        return
    checks = [("num_attention_heads", model.num_attention_heads, tp), ("ffn_hidden_size", model.mlp_size, tp),
              ("make_vocab_size_divisible_by", model.make_vocab_size_divisible_by, tp)]  # fmt: skip
    if model.group_query_attention:
        checks.append(("num_query_groups", model.num_query_groups, tp))
    for name, value, size in checks:
        if value % size:
            yield ConfigError(flag(name), value, f"must be divisible by --tensor-model-parallel-size {size}")
    if moe.expert_layout == "dense":
        if ep != 1:
            yield ConfigError("--expert-model-parallel-size", ep, "must be 1 with --expert-layout dense")
        return
    if math.gcd(*moe.expert_counts) % ep:
        yield ConfigError("--num-experts", moe.num_experts, f"must be divisible by --expert-model-parallel-size {ep}, which "
                          f"may be one of {divisors(math.gcd(*moe.expert_counts))}")  # fmt: skip
    expert_size = config.expert_ffn_size
    if expert_size % etp:
        yield ConfigError(
            "--moe-ffn-hidden-size", expert_size, f"must be divisible by --expert-tensor-parallel-size {etp}"
        )
    shared = moe.moe_shared_expert_intermediate_size
    if shared is not None and shared % tp:
        yield ConfigError("--moe-shared-expert-intermediate-size", shared,
                          f"must be divisible by --tensor-model-parallel-size {tp}")  # fmt: skip
    if etp != tp:
        yield from _tokens_divide(config, "--expert-tensor-parallel-size 1")


def _tokens_divide(config: PretrainConfig, cause: str) -> Problems:
    tp, size = config.parallel.tensor_model_parallel_size, config.training.micro_batch_size
    cp = config.parallel.context_parallel_size
    tokens = size * config.model.seq_length // max(cp, 1)
    over = f" over --context-parallel-size {cp}" if cp > 1 else ""
    if tokens % tp:
        yield ConfigError("--micro-batch-size", size, f"micro batch x sequence{over} = {tokens} tokens must be divisible by "
                          f"--tensor-model-parallel-size {tp} with {cause}")  # fmt: skip


def _expert_overlap(config: PretrainConfig, world_size: int) -> Problems:
    moe, parallel = config.moe, config.parallel
    ep, chunks = parallel.expert_model_parallel_size, parallel.moe_dispatch_chunks
    if ep < 1 or moe.fewest_experts % ep:
        return
    if ep > 1 and chunks > moe.fewest_experts // ep:
        yield ConfigError("--moe-dispatch-chunks", chunks, f"must be at most the {moe.fewest_experts // ep} experts that "
                          f"each of --expert-model-parallel-size {ep} ranks holds")  # fmt: skip
    if parallel.moe_shared_expert_overlap and config.shared_expert_size is None:
        yield ConfigError("--moe-shared-expert-overlap", True,
                          "needs --moe-shared-expert-intermediate-size or --moe-residual-mlp")  # fmt: skip
    if parallel.moe_hierarchical_all_to_all and parallel.moe_all_to_all_backend != "extension":
        yield ConfigError("--moe-hierarchical-all-to-all", True, "needs --moe-all-to-all-backend extension")


def _sequence_parallel(config: PretrainConfig, world_size: int) -> Problems:
    tp = config.parallel.tensor_model_parallel_size
    if not config.parallel.sequence_parallel:
        return
    if tp == 1:
        yield ConfigError("--sequence-parallel", True, "needs --tensor-model-parallel-size above 1")
    elif tp > 1:
        yield from _tokens_divide(config, "--sequence-parallel")


def _context_parallel(config: PretrainConfig, world_size: int) -> Problems:
    model, parallel = config.model, config.parallel
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if cp <= 1 or tp < 1:
        return
    length, step = model.seq_length, 2 * cp
    if length % step:
        below = length // step * step
        nearest = [n for n in (below, below + step) if n]
        yield ConfigError("--seq-length", length, f"must be divisible by 2 x --context-parallel-size {cp} = {step}: "
                          f"{' or '.join(map(str, nearest))}")  # fmt: skip
    if model.attention_dropout:
        yield ConfigError(
            "--attention-dropout", model.attention_dropout, "must be 0 with --context-parallel-size above 1"
        )
    if parallel.cp_comm_type == "a2a":
        yield from _heads_divide(config)
        return
    alone = {"sliding_window": model.sliding_window, "attn_logit_softcapping": model.attn_logit_softcapping,
             "softmax_type": model.softmax_type if model.softmax_type != "vanilla" else None,
             "reset_attention_mask": config.data.reset_attention_mask or None}  # fmt: skip
    for name, value in alone.items():
        if value is not None:
            yield ConfigError(flag(name), value, f"needs --cp-comm-type a2a with --context-parallel-size {cp}, not p2p")


def _heads_divide(config: PretrainConfig) -> Problems:
    """All-to-alls give each context-parallel rank some of the heads of its tensor-parallel rank."""
    model, tp, cp = config.model, config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    heads, name = model.num_attention_heads, "num_attention_heads"
    if model.group_query_attention and not model.multi_latent_attention:
        heads, name = model.num_query_groups, "num_query_groups"
    if heads % tp == 0 and heads // tp % cp:
        yield ConfigError("--cp-comm-type", "a2a", f"needs {flag(name)} {heads} over --tensor-model-parallel-size {tp} to be "
                          f"divisible by --context-parallel-size {cp}, which may be one of {divisors(heads // tp)}; p2p needs "
                          "no such thing")  # fmt: skip


def _batches_divide(config: PretrainConfig, world_size: int) -> Problems:
    if not 1 <= dense_model_size(config.parallel) <= world_size:
        return
    dp = data_parallel_size(config, world_size)
    per_pass = config.training.micro_batch_size * dp
    total, ramp = global_batch_size(config, world_size), config.training.rampup_batch_size
    multiple = (
        f"a multiple of --micro-batch-size {config.training.micro_batch_size} x data-parallel size {dp} = {per_pass}"
    )
    if per_pass > 0 and total % per_pass:
        yield ConfigError("--global-batch-size", total, f"must be {multiple}")
    elif per_pass > 0 and any(size % per_pass for size in batch_sizes(config, world_size)):
        yield ConfigError("--rampup-batch-size", ramp, f"must make each batch size {multiple}")
    group = config.moe.moe_aux_loss_group_size
    if group is not None and group > 0 and per_pass > 0 and per_pass % group:
        # Loads of other micro-batches are not known when the first one's gradient is formed.
        yield ConfigError("--moe-aux-loss-group-size", group, f"must divide --micro-batch-size "
                          f"{config.training.micro_batch_size} x data-parallel size {dp}: one of {divisors(per_pass)}")  # fmt: skip


def _elastic(config: PretrainConfig, world_size: int) -> Problems:
    if config.parallel.elastic and config.training.global_batch_size is None:
        yield ConfigError("--elastic", True, "needs --global-batch-size: one that follows the number of ranks would change "
                          "the course of training")  # fmt: skip


RULES = (
    _elastic,
    _world_divides,
    _matrices_divide,
    _expert_overlap,
    _sequence_parallel,
    _context_parallel,
    _batches_divide,
)
