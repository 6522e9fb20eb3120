"""Rules of a model's sizes, which must fit each other."""

from __future__ import annotations

import math

from megatron_samoe.config import needs
from megatron_samoe.config.derived import (
    divisors,
    experts_per_layer,
    flag,
    num_moe_layers,
    sharing_map,
)
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Problems
from megatron_samoe.config.sharing_map import Source, words_with
from megatron_samoe.errors import ConfigError


def _attention_sizes(config: PretrainConfig, world_size: int) -> Problems:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_kv_heads
    if model.ffn_hidden_size is None and model.hidden_size > 0 and model.mlp_size < 1:
        yield ConfigError(
            "--hidden-size", model.hidden_size, "is too small for --swiglu's derived MLP; give --ffn-hidden-size"
        )
    if model.kv_channels is None and heads > 0 and model.hidden_size % heads:
        yield ConfigError("--num-attention-heads", heads,
                          f"must divide --hidden-size {model.hidden_size}, or give --kv-channels")  # fmt: skip
    if groups > 0 and heads % groups:
        yield ConfigError("--num-query-groups", groups, f"must divide --num-attention-heads {heads}")
    if model.position_embedding_type == "rope" and not model.multi_latent_attention:
        if heads < 1:
            return
        rotated = model.head_dim * model.rotary_percent
        if not 0 < model.rotary_percent <= 1 or rotated != int(rotated) or int(rotated) % 2:
            yield ConfigError("--rotary-percent", model.rotary_percent,
                              f"must leave an even, whole number of the {model.head_dim} head channels to rotate")  # fmt: skip
    if model.multi_latent_attention:
        yield from _latents(model)
    if model.add_qkv_bias and model.attention_bias is not None:
        yield ConfigError("--add-qkv-bias", True, "has no use with --attention-bias, which says it of both projections")
    skip = model.window_attn_skip_freq
    if skip is not None and not 2 <= skip <= max(model.num_layers, 2):
        yield ConfigError("--window-attn-skip-freq", skip, f"must be from 2 to the {model.num_layers} layers")
    if model.qk_layernorm_scope == "all" and model.normalization != "RMSNorm":
        yield ConfigError("--qk-layernorm-scope", "all", "needs --normalization RMSNorm")
    if model.rope_scaling_type == "yarn" and model.rotary_base <= 1:
        yield ConfigError("--rotary-base", model.rotary_base, "must be above 1 with --rope-scaling-type yarn")
    if model.rope_scaling_type is not None and model.rope_scaling_factor < 1:
        yield ConfigError("--rope-scaling-factor", model.rope_scaling_factor, "must be 1 or more")
    if needs.TRAINED_LENGTH.is_met(config) and model.rope_original_max_positions is None:
        yield ConfigError("--rope-original-max-positions", None,
                          f"must be given with --rope-scaling-type {model.rope_scaling_type}")  # fmt: skip
    for low, high in (("rope_low_freq_factor", "rope_high_freq_factor"), ("yarn_beta_slow", "yarn_beta_fast")):
        if getattr(model, low) >= getattr(model, high):
            yield ConfigError(flag(low), getattr(model, low), f"must be below {flag(high)} {getattr(model, high)}")
    if model.position_embedding_type == "learned_absolute" and model.max_positions < model.seq_length:
        yield ConfigError("--max-position-embeddings", model.max_positions,
                          f"must be at least --seq-length {model.seq_length} with learned positions")  # fmt: skip


def _latents(model: ModelConfig) -> Problems:
    if model.position_embedding_type != "rope":
        yield ConfigError("--multi-latent-attention", True, "needs --position-embedding-type rope")
    unused = {
        "group_query_attention": False,
        "kv_channels": None,
        "qk_layernorm": False,
        "add_qkv_bias": False,
        "attention_bias": None,
        "clip_qkv": None,
        "rotary_percent": 1.0,
    }
    for name, default in unused.items():
        if (value := getattr(model, name)) != default:
            yield ConfigError(
                flag(name), value, "has no use with --multi-latent-attention, which has sizes and norms of its own"
            )
    if model.qk_pos_emb_head_dim % 2:
        yield ConfigError("--qk-pos-emb-head-dim", model.qk_pos_emb_head_dim, "must be even")
    if model.v_head_dim > model.query_dim:
        yield ConfigError(
            "--v-head-dim", model.v_head_dim, f"must be at most --qk-head-dim + --qk-pos-emb-head-dim {model.query_dim}"
        )


def _moe_sizes(config: PretrainConfig, world_size: int) -> Problems:
    model, moe = config.model, config.moe
    if moe.expert_layout == "dense":
        return
    try:
        layers = num_moe_layers(config)
    except ConfigError as error:
        yield error
        return
    if layers == 0:
        yield ConfigError(
            "--moe-layer-freq", moe.moe_layer_freq, "must make at least one layer MoE, or use --expert-layout dense"
        )
    if not isinstance(moe.num_experts, int):
        yield from _experts_of_layers(config, layers, moe.num_experts)
    if moe.moe_router_topk > moe.fewest_experts:
        yield ConfigError(
            "--moe-router-topk", moe.moe_router_topk, f"must be at most --num-experts {moe.fewest_experts}"
        )
    elif moe.moe_ffn_hidden_size is None and moe.moe_router_topk > 0 and model.mlp_size % moe.moe_router_topk:
        yield ConfigError("--moe-ffn-hidden-size", None, f"must be given where --moe-router-topk {moe.moe_router_topk} does "
                          f"not divide the dense MLP's width {model.mlp_size}")  # fmt: skip
    if moe.moe_router_topk == 1 and not moe.pre_softmax:
        yield ConfigError("--moe-router-pre-softmax", False, "must be true with --moe-router-topk 1: the score of one expert "
                          "among the chosen is always 1, so the router would learn nothing")  # fmt: skip
    if moe.moe_shared_expert_gate and moe.moe_residual_mlp:
        yield ConfigError(
            "--moe-shared-expert-gate", True, "has no use with --moe-residual-mlp, which weighs that MLP itself"
        )
    if moe.shares_experts and moe.pool_replica_check_interval is not None and moe.samoe_pool_placement != "replicated":
        yield ConfigError("--pool-replica-check-interval", moe.pool_replica_check_interval,
                          "needs --samoe-pool-placement replicated: what is sharded has no copies to compare")  # fmt: skip


def _routing(config: PretrainConfig, world_size: int) -> Problems:
    moe = config.moe
    groups, chosen, topk = moe.moe_router_num_groups, moe.moe_router_group_topk, moe.moe_router_topk
    if (
        moe.expert_layout == "dense"
        or min((topk, *(n for n in (groups, chosen) if n is not None), *moe.expert_counts)) < 1
    ):
        return
    common = math.gcd(*moe.expert_counts)
    if groups is not None and common % groups:
        yield ConfigError("--moe-router-num-groups", groups, f"must divide --num-experts: one of {divisors(common)}")
    elif groups is not None and chosen is None:
        yield ConfigError("--moe-router-group-topk", None, "must be given with --moe-router-num-groups")
    elif groups is not None and chosen is not None:
        if chosen > groups or topk % chosen:
            legal = [d for d in divisors(topk) if d <= groups]
            yield ConfigError("--moe-router-group-topk", chosen, f"must divide --moe-router-topk {topk} and be at most "
                              f"--moe-router-num-groups {groups}: one of {legal}")  # fmt: skip
        elif topk // chosen > moe.fewest_experts // groups:
            yield ConfigError("--moe-router-group-topk", chosen, f"leaves a token {chosen} groups of {moe.fewest_experts // groups} "
                              f"experts, fewer than --moe-router-topk {topk}")  # fmt: skip
    score = moe.moe_router_score_function
    if score in ("norm", "relu") and moe.moe_router_pre_softmax is not None:
        yield ConfigError("--moe-router-pre-softmax", moe.moe_router_pre_softmax,
                          f"has no use with --moe-router-score-function {score}, whose scores are weights as they are")  # fmt: skip
    chooses_topk = score != "relu" and not moe.moe_router_expert_choice
    others = {"--moe-router-enable-expert-bias": moe.moe_router_enable_expert_bias, "--moe-router-num-groups": groups,
              "--moe-router-topk-scaling-factor": moe.moe_router_topk_scaling_factor}  # fmt: skip
    for name, value in others.items():
        if value and not chooses_topk:
            by = "--moe-router-score-function relu" if score == "relu" else "--moe-router-expert-choice"
            yield ConfigError(name, value, f"has no use with {by}, where no token chooses its best experts")
    if score == "relu" and moe.moe_router_load_balancing_type == "none":
        yield ConfigError("--moe-router-load-balancing-type", "none", "must be another with --moe-router-score-function relu: "
                          "the loss alone keeps the number of experts small")  # fmt: skip
    elif score == "relu" and moe.moe_aux_loss_coeff == 0:
        yield ConfigError("--moe-aux-loss-coeff", 0.0, "must be above 0 with --moe-router-score-function relu")
    if moe.moe_router_expert_choice and (score != "softmax" or moe.moe_router_load_balancing_type != "none"
                                         or moe.moe_expert_capacity_factor is not None
                                         or moe.moe_router_pre_softmax is not None):  # fmt: skip
        yield ConfigError("--moe-router-expert-choice", True, "needs --moe-router-load-balancing-type none and softmax scores, and no "
                          "--moe-expert-capacity-factor or --moe-router-pre-softmax: every expert takes equally many tokens")  # fmt: skip
    if moe.moe_balance_scope == "set" and not any(way.in_sets for way in moe.ways):
        yield ConfigError("--moe-balance-scope", "set", "needs --expert-sharing tied, scaled or pool, not "
                          f"{moe.sharing}")  # fmt: skip
    if moe.balances_sets and moe.balance_group_size > 1:
        yield ConfigError("--moe-aux-loss-group-size", moe.moe_aux_loss_group_size, "must be 1 with --moe-balance-scope set, "
                          "which balances within each sequence")  # fmt: skip


def _sharing(config: PretrainConfig, world_size: int) -> Problems:
    moe = config.moe
    if moe.expert_layout == "dense" or moe.num_expert_sets < 1 or moe.untied_ends < 0:
        return
    try:
        layers = num_moe_layers(config)
        counts, sources = experts_per_layer(moe, layers), sharing_map(config)
    except ConfigError as error:
        if error.field not in ("--moe-layer-freq", "--num-experts"):  # these are others' to report
            yield error
        return
    if moe.untied_ends:
        if not moe.sharing_reads("untied_ends"):
            words = words_with("untied_ends")
            yield ConfigError("--untied-ends", moe.untied_ends, f"needs --expert-sharing {words}: a map says "
                              "itself which layers own their experts, and a pool is one for all")  # fmt: skip
        elif 2 * moe.untied_ends > layers - 2:
            yield ConfigError("--untied-ends", moe.untied_ends,
                              f"must leave at least 2 of {layers} MoE layers that share, so at most {max(layers - 2, 0) // 2}")  # fmt: skip
    by_source: dict[Source, set[int]] = {}
    for source, count in zip(sources, counts, strict=True):
        by_source.setdefault(source, set()).add(count)
    for source, found in by_source.items():
        if source.way.is_shared and len(found) > 1:
            what = f"use set {source.number}" if source.way.in_sets else "combine the same banks"
            yield ConfigError("--num-experts", moe.num_experts, f"must be one number for all layers that {what}")
    combined = sum(source.way.combines for source in sources)
    if combined and moe.samoe_granularity == "layer" and moe.num_expert_banks > combined:
        yield ConfigError("--num-expert-banks", moe.num_expert_banks, "must be at most the number of MoE layers that combine "
                          f"them, {combined}: more banks than layers save nothing")  # fmt: skip


def _candidates(config: PretrainConfig, world_size: int) -> Problems:
    """What layers may choose from while that changes."""
    moe = config.moe
    if moe.expert_layout == "dense" or min(moe.num_neighbour_layers, moe.pool_lock_step or 1, moe.fewest_experts) < 1:
        return
    try:
        layers = num_moe_layers(config)
    except ConfigError:  # another rule reports it
        return
    adds_up = moe.sharing_reads("num_neighbour_layers")
    if adds_up and not isinstance(moe.num_experts, int):
        yield ConfigError("--num-experts", moe.num_experts, "must be one number with --expert-sharing neighbours")
    if adds_up and not 2 <= moe.num_neighbour_layers <= layers:
        yield ConfigError(
            "--num-neighbour-layers", moe.num_neighbour_layers, f"must be from 2 to the {layers} MoE layers"
        )
    change = {"--pool-lock-step": moe.pool_lock_step, "--neighbour-unmask-steps": moe.neighbour_unmask_steps}
    for name, steps in change.items():
        if steps and (moe.moe_router_expert_choice or moe.moe_expert_capacity_factor is not None):
            yield ConfigError(name, steps, "cannot be used with --moe-router-expert-choice or --moe-expert-capacity-factor, which "
                              "count on all experts")  # fmt: skip
    training, checkpoint = config.training, config.checkpoint
    is_new = not (checkpoint.finetune or checkpoint.pretrained_checkpoint or training.skip_train)
    if is_new and moe.neighbour_unmask_steps > training.train_iters:
        yield ConfigError("--neighbour-unmask-steps", moe.neighbour_unmask_steps,
                          f"must be at most --train-iters {training.train_iters}")  # fmt: skip
    if moe.pool_lock_step is None or not moe.sharing_reads("pool_lock_step"):
        return
    if moe.moe_router_num_groups is not None:
        yield ConfigError("--moe-router-num-groups", moe.moe_router_num_groups, "cannot be used with --pool-lock-step: a layer's own "
                          "experts may leave no group with enough of them")  # fmt: skip
    least, experts = moe.moe_router_topk * layers, moe.fewest_experts
    if layers < 2 or experts % layers or experts < least:
        near = max(round(experts / max(layers, 1)) * layers, least)
        yield ConfigError("--num-experts", moe.num_experts, f"must be a multiple of the {layers} MoE layers with --pool-lock-step, "
                          f"with at least --moe-router-topk {moe.moe_router_topk} for each, such as {near}")  # fmt: skip
    end = moe.pool_lock_step + moe.pool_lock_anneal_steps
    if is_new and end > training.train_iters:
        yield ConfigError("--pool-lock-step", moe.pool_lock_step, f"with --pool-lock-anneal-steps {moe.pool_lock_anneal_steps} ends "
                          f"at {end}, after --train-iters {training.train_iters}")  # fmt: skip


def _experts_of_layers(config: PretrainConfig, layers: int, experts: tuple[int, ...]) -> Problems:
    try:
        experts_per_layer(config.moe, layers)
    except ConfigError as error:
        yield error


RULES = (_attention_sizes, _moe_sizes, _routing, _sharing, _candidates)
