"""Rules of experts: how many, how tokens choose them, and how layers share them."""

from __future__ import annotations

import math

from megatron_samoe.config.derived import divisors, experts_per_layer, num_moe_layers, sharing_map
from megatron_samoe.config.needs import EXPERTS
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Rows, Table
from megatron_samoe.config.sharing_map import Source, words_with


def _choices(config: PretrainConfig, _: int) -> Rows:
    fewest = config.moe.fewest_experts
    yield "moe_router_topk", config.moe.moe_router_topk > fewest, f"must be at most --num-experts {fewest}"


def _sizes(config: PretrainConfig, _: int) -> Rows:
    moe, width = config.moe, config.model.mlp_size
    topk, fewest = moe.moe_router_topk, moe.fewest_experts
    no_layer = num_moe_layers(config) == 0
    yield "moe_layer_freq", no_layer, "must make at least one layer MoE, or use --expert-layout dense"
    is_open = moe.moe_ffn_hidden_size is None and topk <= fewest and width % topk
    allowed = f"must be given where --moe-router-topk {topk} does not divide the dense MLP's width {width}"
    yield "moe_ffn_hidden_size", is_open, allowed
    allowed = (
        "must be true with --moe-router-topk 1: the score of one expert among the chosen is always 1, so the router "
    )
    yield "moe_router_pre_softmax", topk == 1 and not moe.pre_softmax, allowed + "would learn nothing"
    allowed = "has no use with --moe-residual-mlp, which weighs that MLP itself"
    yield "moe_shared_expert_gate", moe.moe_shared_expert_gate and moe.moe_residual_mlp, allowed
    has_copies = not moe.shares_experts or moe.samoe_pool_placement == "replicated"
    allowed = "needs --samoe-pool-placement replicated: what is sharded has no copies to compare"
    yield "pool_replica_check_interval", moe.pool_replica_check_interval is not None and not has_copies, allowed


def _groups(config: PretrainConfig, _: int) -> Rows:
    moe, common = config.moe, math.gcd(*config.moe.expert_counts)
    groups, topk = moe.moe_router_num_groups, moe.moe_router_topk
    if groups is None:
        return
    yield "moe_router_num_groups", common % groups, f"must divide --num-experts: one of {divisors(common)}"
    if common % groups:
        return
    chosen, experts = moe.moe_router_group_topk or 1, moe.fewest_experts // groups
    legal = [d for d in divisors(topk) if d <= groups]
    is_missing = moe.moe_router_group_topk is None
    yield "moe_router_group_topk", is_missing, "must be given with --moe-router-num-groups"
    allowed = f"must divide --moe-router-topk {topk} and be at most --moe-router-num-groups {groups}: one of {legal}"
    yield "moe_router_group_topk", chosen not in legal, allowed
    allowed = f"leaves a token {chosen} groups of {experts} experts, fewer than --moe-router-topk {topk}"
    yield "moe_router_group_topk", topk // chosen > experts, allowed


def _scores(config: PretrainConfig, _: int) -> Rows:
    moe = config.moe
    score, is_balanced = moe.moe_router_score_function, moe.moe_router_load_balancing_type != "none"
    by_relu, by_experts = score == "relu", moe.moe_router_expert_choice
    is_weighed = moe.moe_router_pre_softmax is not None
    allowed = f"has no use with --moe-router-score-function {score}, whose scores are weights as they are"
    yield "moe_router_pre_softmax", score in ("norm", "relu") and is_weighed, allowed
    by = "--moe-router-score-function relu" if by_relu else "--moe-router-expert-choice"
    for name in ("moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_topk_scaling_factor"):
        allowed = f"has no use with {by}, where no token chooses its best experts"
        yield name, (by_relu or by_experts) and getattr(moe, name), allowed
    allowed = "must be another with --moe-router-score-function relu: only the loss keeps the number of experts small"
    yield "moe_router_load_balancing_type", by_relu and not is_balanced, allowed
    is_free = by_relu and is_balanced and moe.moe_aux_loss_coeff == 0
    yield "moe_aux_loss_coeff", is_free, "must be above 0 with --moe-router-score-function relu"
    is_capped = moe.moe_expert_capacity_factor is not None
    allowed = "needs --moe-router-load-balancing-type none and softmax scores, and no --moe-expert-capacity-factor or "
    allowed += "--moe-router-pre-softmax: every expert takes equally many tokens"
    yield (
        "moe_router_expert_choice",
        by_experts and (score != "softmax" or is_balanced or is_capped or is_weighed),
        allowed,
    )
    has_sets = any(way.in_sets for way in moe.ways)
    allowed = f"needs --expert-sharing tied, scaled or pool, not {moe.sharing}"
    yield "moe_balance_scope", moe.moe_balance_scope == "set" and not has_sets, allowed
    allowed = "must be 1 with --moe-balance-scope set, which balances within each sequence"
    yield "moe_aux_loss_group_size", moe.balances_sets and moe.balance_group_size > 1, allowed


def _sharing(config: PretrainConfig, _: int) -> Rows:
    moe, layers = config.moe, num_moe_layers(config)
    ends, counts, sources = moe.untied_ends, experts_per_layer(moe, layers), sharing_map(config)
    allowed = f"needs --expert-sharing {words_with('untied_ends')}: a map says itself which layers own their experts, "
    yield "untied_ends", ends and not moe.sharing_reads("untied_ends"), allowed + "and a pool is one for all"
    most = max(layers - 2, 0) // 2
    allowed = f"must leave at least 2 of {layers} MoE layers that share, so at most {most}"
    yield "untied_ends", ends > most, allowed
    by_source: dict[Source, set[int]] = {}
    for source, count in zip(sources, counts, strict=True):
        by_source.setdefault(source, set()).add(count)
    for source, found in by_source.items():
        what = f"use set {source.number}" if source.way.in_sets else "combine the same banks"
        is_mixed = source.way.is_shared and len(found) > 1
        yield "num_experts", is_mixed, f"must be one number for all layers that {what}"
    combined = sum(source.way.combines for source in sources)
    is_wasted = combined and moe.samoe_granularity == "layer" and moe.num_expert_banks > combined
    allowed = (
        f"must be at most the number of MoE layers that combine them, {combined}: more banks than layers save nothing"
    )
    yield "num_expert_banks", is_wasted, allowed


def _candidates(config: PretrainConfig, _: int) -> Rows:
    """Rules of candidates that change."""
    moe, layers, steps = config.moe, num_moe_layers(config), config.training.train_iters
    if moe.sharing_reads("num_neighbour_layers"):
        several = not isinstance(moe.num_experts, int)
        yield "num_experts", several, "must be one number with --expert-sharing neighbours"
        is_outside = not 2 <= moe.num_neighbour_layers <= layers
        yield "num_neighbour_layers", is_outside, f"must be from 2 to the {layers} MoE layers"
    counts_on_all = moe.moe_router_expert_choice or moe.moe_expert_capacity_factor is not None
    for name in ("pool_lock_step", "neighbour_unmask_steps"):
        allowed = (
            "cannot be used with --moe-router-expert-choice or --moe-expert-capacity-factor, which count on all experts"
        )
        yield name, getattr(moe, name) and counts_on_all, allowed
    is_new = not (config.checkpoint.finetune or config.checkpoint.pretrained_checkpoint or config.training.skip_train)
    start = moe.neighbour_unmask_start
    allowed = f"must be at most --train-iters {steps}" + (f" less --neighbour-unmask-start {start}" if start else "")
    yield "neighbour_unmask_steps", is_new and start + moe.neighbour_unmask_steps > steps, allowed
    if moe.pool_lock_step is not None and moe.sharing_reads("pool_lock_step"):
        yield from _lock(config, layers, is_new)


def _lock(config: PretrainConfig, layers: int, is_new: bool) -> Rows:
    moe, steps = config.moe, config.training.train_iters
    assert moe.pool_lock_step is not None
    allowed = "cannot be used with --pool-lock-step: a layer's own experts may leave no group with enough of them"
    yield "moe_router_num_groups", moe.moe_router_num_groups is not None, allowed
    topk, experts, annealed = moe.moe_router_topk, moe.fewest_experts, moe.pool_lock_anneal_steps
    near = max(round(experts / max(layers, 1)), topk) * layers
    allowed = f"must be a multiple of the {layers} MoE layers with --pool-lock-step, with at least --moe-router-topk {topk} for "
    is_unequal = layers < 2 or experts % layers or experts < topk * layers
    yield "num_experts", is_unequal, allowed + f"each, such as {near}"
    end = moe.pool_lock_step + annealed
    allowed = f"with --pool-lock-anneal-steps {annealed} ends at {end}, after --train-iters {steps}"
    yield "pool_lock_step", is_new and end > steps, allowed
    allowed = f"must be at most --pool-lock-step {moe.pool_lock_step}"
    yield "pool_lock_vote_steps", moe.pool_lock_vote_steps > moe.pool_lock_step, allowed
    allowed = "needs --moe-balance-scope set: a loss that keeps the loads of each layer even would work against it"
    yield "pool_lock_entropy_coeff", moe.pool_lock_entropy_coeff and not moe.balances_sets, allowed


#: What a model's sizes must keep, whatever else is wrong with it.
CHOICES = Table(("moe",), _choices, EXPERTS)
TABLES = (
    CHOICES,
    Table(("model", "moe"), _sizes, EXPERTS),
    Table(("moe",), _groups, EXPERTS),
    Table(("moe",), _scores, EXPERTS),
    Table(("model", "moe"), _sharing, EXPERTS),
    Table(("model", "moe", "training"), _candidates, EXPERTS),
)
