"""Bytes of activations that autograd keeps: pure arithmetic, checked against what it does keep.

T tokens of a micro-batch, H hidden, c bytes an element. A layer keeps, in the order of its forward pass, its input (for
the norm), the normed input (for the projection), queries, keys and values in one tensor, attention's output, the residual
stream, its norm, and the MLP's two inner tensors. With sequence parallelism what lies between the split matrices is 1/tp
of the tokens; what enters a split matrix is gathered and kept whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.models.layer_layout import StagePlan
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.tensor_parallel.layers import padded_vocab_size

FP32_BYTES = 4


def activation_bytes(
    config: PretrainConfig, vocab_size: int, grid: RankGrid, pipeline_rank: int, plans: Sequence[StagePlan],
    micro_batches: int,
) -> int:  # fmt: skip
    """Returns the activations at a stage's peak: all passes in flight, one layer's recomputed ones, and the head's.

    Args:
        plans: of the stage's chunks.
    """
    parallel = config.parallel
    passes = passes_in_flight(parallel.pipeline_schedule, grid.pp, pipeline_rank, len(plans), micro_batches)
    layers = Counter(
        (x.moe_index is not None, _is_recomputed(config, i)) for p in plans for i, x in enumerate(p.layers)
    )
    whole = {is_moe: layer_bytes(config, is_moe, grid) for is_moe, _ in layers}
    inputs = _residual_bytes(config, grid)
    all_chunks = sum(n * (inputs if again else whole[is_moe]) for (is_moe, again), n in layers.items())
    boundary = inputs if grid.pp > 1 else 0
    kept = passes * (all_chunks // len(plans) + boundary)
    recomputed = max((whole[is_moe] for is_moe, again in layers if again), default=0)
    head = head_bytes(config, vocab_size, grid) if any(p.has_head for p in plans) else 0
    heads = passes if parallel.pipeline_schedule == "gpipe" else 1
    return kept + recomputed + head * heads + _layer_mode_workspace(config, grid)


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


def layer_bytes(config: PretrainConfig, is_moe: bool, grid: RankGrid) -> int:
    """Returns what autograd keeps of one layer that is not recomputed."""
    return _attention_bytes(config, grid) + (_moe_bytes(config, grid) if is_moe else _mlp_bytes(config, grid))


def head_bytes(config: PretrainConfig, vocab_size: int, grid: RankGrid) -> int:
    """Returns the bytes of one micro-batch's head: normed input, logits, probabilities (fp32), and their gradient."""
    tokens, size = _tokens(config), _size(config)
    width = min(vocab_size, padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by) // grid.tp)
    normed = tokens * config.model.hidden_size * size + _residual_bytes(config, grid)
    return normed + tokens * width * (size + 2 * FP32_BYTES)


def _size(config: PretrainConfig) -> int:
    return 2 if config.training.bf16 or config.training.fp16 else FP32_BYTES


def _tokens(config: PretrainConfig) -> int:
    return config.training.micro_batch_size * config.model.seq_length


def _local_tokens(config: PretrainConfig, grid: RankGrid) -> int:
    return _tokens(config) // grid.tp if config.parallel.sequence_parallel else _tokens(config)


def _residual_bytes(config: PretrainConfig, grid: RankGrid) -> int:
    return _local_tokens(config, grid) * config.model.hidden_size * _size(config)


def _is_recomputed(config: PretrainConfig, number: int) -> bool:
    training = config.training
    limit = training.recompute_num_layers
    return training.recompute_granularity == "full" and (limit is None or number < limit)


def _norm_input_bytes(config: PretrainConfig, grid: RankGrid) -> int:
    """A fused norm's input and statistics."""
    statistics = _local_tokens(config, grid) * FP32_BYTES * (2 if config.model.normalization == "LayerNorm" else 1)
    return _residual_bytes(config, grid) + statistics


def _norm_bytes(config: PretrainConfig, grid: RankGrid) -> int:
    """The same, and the output that enters a split matrix."""
    return _norm_input_bytes(config, grid) + _tokens(config) * config.model.hidden_size * _size(config)


def _attention_bytes(config: PretrainConfig, grid: RankGrid) -> int:
    model, tokens, size = config.model, _tokens(config), _size(config)
    heads, kv_heads = model.num_attention_heads // grid.tp, model.num_kv_heads // grid.tp
    queries, qkv = heads * model.head_dim, (heads + 2 * kv_heads) * model.head_dim
    inner = qkv + queries
    # Queries that share keys are copied out of the projection; so are rotated or normed queries and keys.
    if model.position_embedding_type == "rope" or model.qk_layernorm:
        inner += queries + kv_heads * model.head_dim
    elif heads > kv_heads:
        inner += queries
    if model.qk_layernorm and model.position_embedding_type == "rope":
        inner += queries + kv_heads * model.head_dim
    log_sums = 0 if config.training.recompute_granularity == "selective" else tokens * heads * FP32_BYTES
    return _norm_bytes(config, grid) + tokens * inner * size + log_sums + _dropout_bytes(config, grid)


def _dropout_bytes(config: PretrainConfig, grid: RankGrid) -> int:
    return _residual_bytes(config, grid) if config.model.hidden_dropout else 0


def _inner_width(config: PretrainConfig, width: int) -> int:
    """Elements a token that an MLP keeps of its inner tensors: SiLU-gated ones keep both halves, the gate's SiLU, and
    the product."""
    return 4 * width if config.model.swiglu else 2 * width


def _mlp_bytes(config: PretrainConfig, grid: RankGrid) -> int:
    inner = _tokens(config) * _inner_width(config, config.model.mlp_size // grid.tp) * _size(config)
    return _norm_bytes(config, grid) + inner + _dropout_bytes(config, grid)


def _moe_bytes(config: PretrainConfig, grid: RankGrid) -> int:
    model, moe, size = config.model, config.moe, _size(config)
    tokens = _tokens(config)
    routed_tokens = tokens if grid.etp == grid.tp else tokens // grid.tp
    rows = routed_tokens * moe.moe_router_topk
    width = config.expert_ffn_size // grid.etp
    # Experts keep their first product; the backward makes the activations anew.
    inner = rows * ((2 if model.swiglu else 1) * width + 2 * model.hidden_size) * size
    router = tokens * (2 * moe.num_experts + moe.moe_router_topk) * FP32_BYTES
    indices = 8 * (routed_tokens * (2 * moe.moe_router_topk + 1) + 2 * rows)
    # Permuting keeps no input; the router keeps its own in fp32, and a shared expert the gathered one.
    router += _local_tokens(config, grid) * model.hidden_size * FP32_BYTES
    total = _norm_input_bytes(config, grid) + router + indices + inner + _dropout_bytes(config, grid)
    shared = moe.moe_shared_expert_intermediate_size
    if shared is not None:
        total += tokens * _inner_width(config, shared // grid.tp) * size
        if size < FP32_BYTES or _local_tokens(config, grid) < tokens:
            total += tokens * model.hidden_size * size
    return total


def _layer_mode_workspace(config: PretrainConfig, grid: RankGrid) -> int:
    """One layer's combined experts and their gradients, which layer mode makes in its backward."""
    model, moe = config.model, config.moe
    if not moe.has_pool or moe.samoe_combine != "layer":
        return 0
    width = config.expert_ffn_size
    matrices = (3 if model.swiglu else 2) * width * model.hidden_size // grid.etp
    return moe.num_experts // grid.ep * matrices * (_size(config) + FP32_BYTES)
