"""Rules of experts: how many, how tokens choose them, and how layers share them."""

from __future__ import annotations

import math

from megatron_samoe.config.derived import divisors, experts_per_layer, num_moe_layers, sharing_map
from megatron_samoe.config.needs import EXPERTS
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Rule, Rules, Table
from megatron_samoe.config.sharing_map import ExpertSource, words_with


def _choices(config: PretrainConfig, _: int) -> Rules:
    fewest = config.moe.fewest_experts
    yield Rule("moe_router_topk", config.moe.moe_router_topk > fewest, f"must be at most --num-experts {fewest}")


def _sizes(config: PretrainConfig, _: int) -> Rules:
    moe, width = config.moe, config.model.mlp_size
    topk = moe.moe_router_topk
    allowed = "must make at least one layer MoE, or use --expert-layout dense"
    yield Rule("moe_layer_freq", num_moe_layers(config) == 0, allowed)
    if moe.moe_ffn_hidden_size is None and topk <= moe.fewest_experts:
        allowed = f"must be given where --moe-router-topk {topk} does not divide the dense MLP's width {width}"
        yield Rule("moe_ffn_hidden_size", width % topk, allowed)
    if topk == 1:
        allowed = "must be true with --moe-router-topk 1: the score of one expert among the chosen is always 1, so the "
        yield Rule("moe_router_pre_softmax", not moe.pre_softmax, allowed + "router would learn nothing")
    if moe.moe_residual_mlp:
        allowed = "has no use with --moe-residual-mlp, which weighs that MLP itself"
        yield Rule("moe_shared_expert_gate", moe.moe_shared_expert_gate, allowed)
    if moe.shares_experts and moe.samoe_pool_placement != "replicated":
        allowed = "needs --samoe-pool-placement replicated: what is sharded has no copies to compare"
        yield Rule("pool_replica_check_interval", moe.pool_replica_check_interval is not None, allowed)


def _groups(config: PretrainConfig, _: int) -> Rules:
    moe, common = config.moe, math.gcd(*config.moe.expert_counts)
    groups, topk, chosen = moe.moe_router_num_groups, moe.moe_router_topk, moe.moe_router_group_topk
    if groups is None:
        return
    yield Rule("moe_router_num_groups", common % groups, f"must divide --num-experts: one of {divisors(common)}")
    if common % groups:
        return
    yield Rule("moe_router_group_topk", chosen is None, "must be given with --moe-router-num-groups")
    if chosen is None:
        return
    legal = [d for d in divisors(topk) if d <= groups]
    allowed = f"must divide --moe-router-topk {topk} and be at most --moe-router-num-groups {groups}: one of {legal}"
    yield Rule("moe_router_group_topk", chosen not in legal, allowed)
    experts = moe.fewest_experts // groups
    allowed = f"leaves a token {chosen} groups of {experts} experts, fewer than --moe-router-topk {topk}"
    yield Rule("moe_router_group_topk", topk // chosen > experts, allowed)


def _scores(config: PretrainConfig, _: int) -> Rules:
    moe = config.moe
    score, weighs_early = moe.moe_router_score_function, moe.moe_router_pre_softmax is not None
    if score in ("norm", "relu"):
        allowed = f"has no use with --moe-router-score-function {score}, whose scores are weights as they are"
        yield Rule("moe_router_pre_softmax", weighs_early, allowed)
    if score == "relu" or moe.moe_router_expert_choice:
        by = "--moe-router-score-function relu" if score == "relu" else "--moe-router-expert-choice"
        for name in ("moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_topk_scaling_factor"):
            allowed = f"has no use with {by}, where no token chooses its best experts"
            yield Rule(name, getattr(moe, name), allowed)
    is_balanced = moe.moe_router_load_balancing_type != "none"
    if score == "relu":
        allowed = (
            "must be another with --moe-router-score-function relu: only the loss keeps the number of experts small"
        )
        yield Rule("moe_router_load_balancing_type", not is_balanced, allowed)
        if is_balanced:
            allowed = "must be above 0 with --moe-router-score-function relu"
            yield Rule("moe_aux_loss_coeff", moe.moe_aux_loss_coeff == 0, allowed)
    if moe.moe_router_expert_choice:
        chooses_otherwise = (score != "softmax", is_balanced, moe.moe_expert_capacity_factor is not None, weighs_early)
        allowed = "needs --moe-router-load-balancing-type none and softmax scores, and no --moe-expert-capacity-factor "
        allowed += "or --moe-router-pre-softmax: every expert takes equally many tokens"
        yield Rule("moe_router_expert_choice", any(chooses_otherwise), allowed)
    if moe.moe_balance_scope == "set":
        allowed = f"needs --expert-sharing tied, scaled or pool, not {moe.sharing}"
        yield Rule("moe_balance_scope", not any(way.in_sets for way in moe.ways), allowed)
    if moe.balances_sets:
        allowed = "must be 1 with --moe-balance-scope set, which balances within each sequence"
        yield Rule("moe_aux_loss_group_size", moe.balance_group_size > 1, allowed)


def _sharing(config: PretrainConfig, _: int) -> Rules:
    moe, layers = config.moe, num_moe_layers(config)
    ends, counts, sources = moe.untied_ends, experts_per_layer(moe, layers), sharing_map(config)
    if not moe.sharing_reads("untied_ends"):
        allowed = f"needs --expert-sharing {words_with('untied_ends')}: a map says itself which layers own their "
        yield Rule("untied_ends", ends, allowed + "experts, and a pool is one for all")
    most = max(layers - 2, 0) // 2
    allowed = f"must leave at least 2 of {layers} MoE layers that share, so at most {most}"
    yield Rule("untied_ends", ends > most, allowed)
    counts_of: dict[ExpertSource, set[int]] = {}
    for source, count in zip(sources, counts, strict=True):
        if source.way.is_shared:
            counts_of.setdefault(source, set()).add(count)
    for source, found in counts_of.items():
        what = f"use set {source.number}" if source.way.in_sets else "combine the same banks"
        yield Rule("num_experts", len(found) > 1, f"must be one number for all layers that {what}")
    combining = sum(source.way.combines for source in sources)
    if combining and moe.samoe_granularity == "layer":
        allowed = (
            f"must be at most the number of MoE layers that combine them, {combining}: more banks than layers save "
        )
        yield Rule("num_expert_banks", moe.num_expert_banks > combining, allowed + "nothing")


def _candidates(config: PretrainConfig, _: int) -> Rules:
    """Rules of candidates that change."""
    moe, layers, steps = config.moe, num_moe_layers(config), config.training.train_iters
    if moe.sharing_reads("num_neighbour_layers"):
        is_one = isinstance(moe.num_experts, int)
        yield Rule("num_experts", not is_one, "must be one number with --expert-sharing neighbours")
        is_inside = 2 <= moe.num_neighbour_layers <= layers
        yield Rule("num_neighbour_layers", not is_inside, f"must be from 2 to the {layers} MoE layers")
    if moe.moe_router_expert_choice or moe.moe_expert_capacity_factor is not None:
        allowed = "cannot be used with --moe-router-expert-choice or --moe-expert-capacity-factor, which count on all "
        for name in ("pool_lock_step", "neighbour_unmask_steps"):
            yield Rule(name, getattr(moe, name), allowed + "experts")
    is_new = not (config.checkpoint.finetune or config.checkpoint.pretrained_checkpoint or config.training.skip_train)
    if is_new:
        start = moe.neighbour_unmask_start
        less = f" less --neighbour-unmask-start {start}" if start else ""
        allowed = f"must be at most --train-iters {steps}{less}"
        yield Rule("neighbour_unmask_steps", start + moe.neighbour_unmask_steps > steps, allowed)
    if moe.pool_lock_step is not None and moe.sharing_reads("pool_lock_step"):
        yield from _lock(config, layers, is_new)


def _lock(config: PretrainConfig, layers: int, is_new: bool) -> Rules:
    moe, steps = config.moe, config.training.train_iters
    assert moe.pool_lock_step is not None
    allowed = "cannot be used with --pool-lock-step: a layer's own experts may leave no group with enough of them"
    yield Rule("moe_router_num_groups", moe.moe_router_num_groups is not None, allowed)
    topk, experts = moe.moe_router_topk, moe.fewest_experts
    is_divided = layers >= 2 and experts % layers == 0 and experts >= topk * layers
    near = max(round(experts / max(layers, 1)), topk) * layers
    allowed = (
        f"must be a multiple of the {layers} MoE layers with --pool-lock-step, with at least --moe-router-topk {topk} "
    )
    yield Rule("num_experts", not is_divided, allowed + f"for each, such as {near}")
    if is_new:
        end = moe.pool_lock_step + moe.pool_lock_anneal_steps
        allowed = (
            f"with --pool-lock-anneal-steps {moe.pool_lock_anneal_steps} ends at {end}, after --train-iters {steps}"
        )
        yield Rule("pool_lock_step", end > steps, allowed)
    allowed = f"must be at most --pool-lock-step {moe.pool_lock_step}"
    yield Rule("pool_lock_vote_steps", moe.pool_lock_vote_steps > moe.pool_lock_step, allowed)
    if not moe.balances_sets:
        allowed = "needs --moe-balance-scope set: a loss that keeps the loads of each layer even would work against it"
        yield Rule("pool_lock_entropy_coeff", moe.pool_lock_entropy_coeff, allowed)


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
