"""Options of experts: how many, in which layers, how tokens reach them, and how layers share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_samoe.config import needs
from megatron_samoe.config.option import (
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    BELOW_ONE,
    NOT_MEGATRON,
    PLANNER,
    POSITIVE,
    READERS,
    model_option,
)
from megatron_samoe.config.sharing_map import COMBINED, OWN, Way, Word, ways_of, word_of


def _known_scores(score_function: str) -> frozenset[str]:
    return {"norm": NOT_MEGATRON, "relu": frozenset(("export", "planner"))}.get(score_function, READERS)


def _readers_of_counts(num_experts: int | tuple[int, ...]) -> frozenset[str]:
    return READERS if isinstance(num_experts, int) else NOT_MEGATRON


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts and the shared pool (SaMoE)."""

    expert_layout: Literal["dense", "moe", "samoe"] = model_option("dense", READERS)
    """dense: no experts; moe: every MoE layer owns its experts, or shares them as --expert-sharing says; samoe: all MoE
    layers combine one pool of banks, short for moe with --expert-sharing combined."""
    expert_sharing: str | None = model_option(None, NOT_MEGATRON, needs=needs.MOE_LAYOUT)
    """How MoE layers share experts. own: not at all; combined: learned mixtures of a pool of banks (SaMoE); tied:
    consecutive layers use one set (Expert Tying); scaled: the same with a learned factor for each layer and matrix; pool:
    all layers choose from one set of --num-experts (UniPool); neighbours: those of a block choose from all experts that they
    have, --num-experts each (ReXMoE). Or a map with an entry for each MoE layer, such as
    0,1,1,1,2 or own,combined*6,own or scaled:0*4,1*4. Derived if not given, from --expert-layout."""
    num_expert_sets: int = model_option(1, NOT_MEGATRON, range=POSITIVE, largest=100_000, needs=needs.SETS)
    """Sets of --expert-sharing tied or scaled: the layers that share are cut into that many blocks."""
    num_neighbour_layers: int = model_option(2, NOT_MEGATRON, range=POSITIVE, largest=100_000, needs=needs.NEIGHBOURS)
    """Consecutive MoE layers that choose from each other's experts with --expert-sharing neighbours (ReXMoE's r)."""
    neighbour_unmask_steps: int = model_option(0, NOT_MEGATRON, range=AT_LEAST_ZERO, needs=needs.NEIGHBOURS)
    """Steps over which neighbours' experts become candidates one by one; a layer begins with its own number. 0: all from the start."""
    neighbour_unmask_start: int = model_option(0, READERS, range=AT_LEAST_ZERO, needs=needs.UNMASKING, may_differ=True)
    """Steps before the first of them opens."""
    neighbour_unmask_order: Literal["own", "random"] = model_option(
        "own", READERS, needs=needs.UNMASKING, may_differ=True
    )
    """own: a layer's own experts are open, then its neighbours' one after the other; random: that number of all, drawn anew in each
    step until all are open (ReXMoE)."""
    pool_lock_step: int | None = model_option(None, NOT_MEGATRON, range=POSITIVE, needs=needs.ONE_POOL)
    """Step after which each expert of the pool has one layer, that which chose it most as far as all layers get equally many
    (UniPool's lock). Experts then move, so that those of each layer lie on all expert-parallel ranks. Never if not given."""
    pool_lock_anneal_steps: int = model_option(100, READERS, range=POSITIVE, needs=needs.POOL_LOCK, may_differ=True)
    """Steps over which the scores of experts that other layers own fall to nothing."""
    pool_lock_vote_steps: int = model_option(1, READERS, range=POSITIVE, needs=needs.POOL_LOCK, may_differ=True)
    """Steps, the last of them --pool-lock-step, by whose choices owners are found: by the mean of their loads."""
    pool_lock_entropy_coeff: float = model_option(
        0.0, READERS, range=AT_LEAST_ZERO, needs=needs.POOL_LOCK, may_differ=True
    )
    """Weight of UniPool's entropy loss, the mean over L layers of (H - log(E / L))^2 with H the entropy of a layer's mean
    scores, so that each comes to use the number of experts that it will own. It grows from 0 up to --pool-lock-step. 0 for none."""
    pool_lock_entropy_group_size: int | None = model_option(
        None, READERS, range=POSITIVE, needs=needs.POOL_ENTROPY, may_differ=True
    )
    """Sequences over which the entropy loss takes mean scores, chosen as for --moe-aux-loss-group-size; 1 if not given."""
    untied_ends: int = model_option(0, NOT_MEGATRON, range=AT_LEAST_ZERO, largest=100_000, needs=needs.SHARING)
    """First MoE layers, and the same number of last ones, that own their experts while those between them share."""
    num_experts: int | tuple[int, ...] = model_option(
        8, _readers_of_counts, range=POSITIVE, largest=1_000_000, needs=needs.EXPERTS, may_be_idle=True
    )
    """Routed experts that each MoE layer chooses from (E); one number for all, or one for each MoE layer in order, as
    PR-MoE's pyramids have. Given without --expert-layout, it makes that moe."""
    moe_layer_freq: str = model_option("1", READERS)
    """An integer N (layer i is MoE where N divides i, counted from 0), or a pattern with one 0 or 1 per layer such as
    0101, [0,1]*4 or [0]*3+[1]*5."""
    moe_ffn_hidden_size: int | None = model_option(None, READERS, range=POSITIVE, needs=needs.EXPERTS)
    """Width of one expert. Derived if not given: the dense MLP's divided by K, so that a token's experts are as much
    work as the dense MLP."""
    moe_router_topk: int = model_option(2, READERS, range=POSITIVE, largest=100_000, needs=needs.EXPERTS)
    """Experts per token (K)."""
    moe_router_score_function: Literal["softmax", "sigmoid", "norm", "relu"] = model_option(
        "softmax", _known_scores, needs=needs.EXPERTS
    )
    """How logits become scores. norm (UniPool's NormRouter): a learned factor per layer times ReLU(logits / their length);
    the chosen experts' scores are their weights as they are. relu (ReMoE): ReLU(logits) are the weights of all experts where
    they are positive; --moe-router-topk is how many these are on average, to which the balance loss is steered."""
    moe_router_relu_update_rate: float = model_option(0.2, READERS, range=ABOVE_ZERO, needs=needs.RELU, may_differ=True)
    """Share by which the balance loss of --moe-router-score-function relu grows in a step while tokens visit more than
    --moe-router-topk experts on average, and by whose inverse it shrinks while they visit fewer."""
    moe_router_expert_choice: bool = model_option(False, PLANNER, needs=needs.EXPERTS)
    """Let each expert choose the S * K / E tokens of a sequence that score it highest (Expert Choice). What it chooses depends
    on later tokens, so that such a model cannot generate text."""
    moe_router_enable_expert_bias: bool = model_option(False, READERS, needs=needs.EXPERTS)
    """Choose experts by score + a bias of each expert, and weigh them by the score only (DeepSeek-V3). After each step the
    bias of an expert with less than the mean load rises by --moe-router-bias-update-rate, that of one with more falls."""
    moe_router_bias_update_rate: float = model_option(
        1e-3, READERS, range=AT_LEAST_ZERO, needs=needs.EXPERT_BIAS, may_differ=True
    )
    """How far an expert's bias moves in a step."""
    moe_router_num_groups: int | None = model_option(None, READERS, range=POSITIVE, needs=needs.EXPERTS)
    """Consecutive groups of experts, of which a token may use --moe-router-group-topk: those whose best K / group-topk
    experts have the largest sum of scores (DeepSeek-V3)."""
    moe_router_group_topk: int | None = model_option(None, READERS, range=POSITIVE, needs=needs.EXPERT_GROUPS)
    """Groups of experts that a token may use."""
    moe_router_topk_scaling_factor: float | None = model_option(None, READERS, range=ABOVE_ZERO, needs=needs.EXPERTS)
    """Factor on the chosen experts' weights; 1 if not given."""
    moe_router_pre_softmax: bool | None = model_option(None, READERS, needs=needs.EXPERTS)
    """Weigh experts by their score among all experts (Switch) rather than among the chosen (GShard). Derived if not
    given: true for top-1, where scores among the chosen would always be 1 and teach the router nothing."""
    moe_router_load_balancing_type: Literal["seq_aux_loss", "aux_loss", "none"] = model_option(
        "seq_aux_loss", READERS, needs=needs.EXPERTS, may_differ=True
    )
    """seq_aux_loss: balance expert loads within each sequence; aux_loss: over --moe-aux-loss-group-size sequences; none.
    Each is the same number under every parallel layout."""
    moe_balance_scope: Literal["layer", "set"] | None = model_option(
        None, READERS, needs=needs.EXPERTS, may_differ=True
    )
    """Loads that are balanced, by losses and by expert biases. layer: each layer's; set: those of a set of experts over all
    layers that use it, so that each layer may prefer some. Derived if not given: set for --expert-sharing pool."""
    moe_aux_loss_group_size: int | None = model_option(
        None, READERS, range=POSITIVE, needs=needs.AUX_LOSS, may_differ=True
    )
    """Sequences over which aux_loss balances; consecutive ones of the global batch that are computed at the same time, so
    it must divide micro batch x data-parallel size. Derived if not given: 1, as seq_aux_loss."""
    moe_aux_loss_coeff: float = model_option(0.05, READERS, range=AT_LEAST_ZERO, needs=needs.BALANCE, may_differ=True)
    """Weight of the load-balance loss."""
    moe_z_loss_coeff: float = model_option(0.0, READERS, range=AT_LEAST_ZERO, needs=needs.EXPERTS, may_differ=True)
    """Weight of the router's z-loss (ST-MoE), 0 for none."""
    moe_router_init_method_std: float | None = model_option(
        None, READERS, range=ABOVE_ZERO, needs=needs.EXPERTS, may_differ=True
    )
    """Standard deviation of initial router weights. Derived if not given: 1 / sqrt(hidden size), so that logits begin
    with a spread of 1."""
    moe_scale_output_init: bool = model_option(True, READERS, needs=needs.EXPERTS, may_differ=True)
    """Draw the experts' output projections wider, so that an MoE layer begins as strong as the dense MLP: its experts
    are narrower and weighted by scores below 1.
    """
    moe_input_jitter_eps: float = model_option(0.0, READERS, range=BELOW_ONE, needs=needs.EXPERTS, may_differ=True)
    """Multiply router inputs by uniform noise in [1 - eps, 1 + eps] while training, 0 for none."""
    moe_expert_capacity_factor: float | None = model_option(
        None, READERS, range=ABOVE_ZERO, needs=needs.EXPERTS, may_differ=True
    )
    """Most tokens of one sequence that an expert takes, as a multiple of S * K / E; more are dropped. Dropless if not
    given. Evaluation never drops."""
    moe_token_drop_policy: Literal["probs", "position"] = model_option(
        "probs", READERS, needs=needs.CAPACITY, may_differ=True
    )
    """Which tokens an expert over its capacity keeps: the most probable or the first."""
    moe_shared_expert_intermediate_size: int | None = model_option(None, READERS, range=POSITIVE, needs=needs.EXPERTS)
    """Width of a shared expert, which every token passes in addition to the routed ones; none if not given."""
    moe_shared_expert_gate: bool = model_option(False, READERS, needs=needs.SHARED_EXPERT)
    """Weigh the shared expert by a learned sigmoid of each token (Qwen2-MoE)."""
    moe_residual_mlp: bool = model_option(False, NOT_MEGATRON, needs=needs.EXPERTS)
    """Give every MoE layer the dense MLP as well, and weigh routed experts against it by a learned softmax of each token
    (PR-MoE). --moe-shared-expert-intermediate-size gives it another width."""
    num_expert_banks: int = model_option(2, READERS, range=POSITIVE, largest=100_000, needs=needs.POOL)
    """Banks of the shared pool (P): full sets of E experts that all MoE layers combine."""
    samoe_combine: Literal["step", "layer"] = model_option("step", READERS, needs=needs.COEFFICIENTS, may_differ=True)
    """step: combine all layers' experts once per optimizer step (fast); layer: while each layer runs (small memory).
    Both compute the same gradients."""
    samoe_granularity: Literal["layer", "expert"] = model_option("layer", READERS, needs=needs.POOL)
    """One set of coefficients per layer, or one per layer and expert."""
    samoe_normalization: Literal["none", "l2", "softmax"] = model_option("none", READERS, needs=needs.POOL)
    """How raw coefficients become the weights of banks."""
    samoe_init: Literal["cyclic", "block", "uniform"] = model_option(
        "cyclic", READERS, needs=needs.POOL, may_differ=True
    )
    """Initial coefficients. cyclic: MoE layer l starts as bank l mod P; block: as bank floor(l * P / L); uniform:
    1/sqrt(P) for every bank plus a little noise."""
    samoe_pool_placement: Literal["sharded", "replicated"] = model_option(
        "sharded", READERS, needs=needs.SHARING, may_differ=True
    )
    """sharded: banks, or sets, and their optimizer state are sharded over the ranks that would hold replicas
    (expert-data-parallel ranks of all pipeline stages) and gathered once per step; replicated: all of it on each rank.
    """
    pool_replica_check_interval: int | None = model_option(
        None, READERS, range=POSITIVE, needs=needs.SHARING, may_differ=True
    )
    """Steps between checks that all copies of banks are equal."""
    samoe_freeze_coefficients: bool = model_option(False, READERS, needs=needs.COEFFICIENTS, may_differ=True)
    """Never train the coefficients (hard sharing): the control for learned ones."""

    @property
    def expert_counts(self) -> tuple[int, ...]:
        """Routed experts as given: one number, or one for each MoE layer."""
        return self.num_experts if isinstance(self.num_experts, tuple) else (self.num_experts,)

    @property
    def most_experts(self) -> int:
        """Routed experts of the layer that has most."""
        return max(self.expert_counts, default=1)

    @property
    def fewest_experts(self) -> int:
        """Routed experts of the layer that has fewest."""
        return min(self.expert_counts, default=1)

    def ffn_size(self, mlp_size: int) -> int:
        """Returns the width of one expert, given that of a dense MLP."""
        return self.moe_ffn_hidden_size or mlp_size // max(self.moe_router_topk, 1)

    @property
    def choices_of_group(self) -> int:
        """Experts that a token uses of each of its groups; of all experts without groups."""
        return self.moe_router_topk // (self.moe_router_group_topk or 1)

    @property
    def weight_factor(self) -> float:
        """The factor on the weights of chosen experts."""
        return self.moe_router_topk_scaling_factor or 1.0

    @property
    def pre_softmax(self) -> bool:
        """Whether weights are scores among all experts."""
        return self.moe_router_topk == 1 if self.moe_router_pre_softmax is None else self.moe_router_pre_softmax

    @property
    def balance_group_size(self) -> int:
        """Sequences over which loads are balanced."""
        grouped = self.moe_router_load_balancing_type == "aux_loss"
        return (self.moe_aux_loss_group_size or 1) if grouped else 1

    @property
    def balances_sets(self) -> bool:
        """Whether loads are balanced over all layers of a shared set."""
        of_word = self.expert_sharing is not None and self.word is not None and self.word.balances_sets
        return (self.moe_balance_scope or ("set" if of_word else "layer")) == "set"

    @property
    def sharing(self) -> str:
        """How MoE layers share experts, in the words of --expert-sharing."""
        return self.expert_sharing or (COMBINED if self.expert_layout == "samoe" else OWN).name

    @property
    def word(self) -> Word | None:
        """The word of --expert-sharing; None for a map."""
        return word_of(self.sharing)

    def sharing_reads(self, option: str) -> bool:
        """Whether an option has an effect with the word of --expert-sharing."""
        return self.word is not None and option in self.word.options

    @property
    def ways(self) -> frozenset[Way]:
        """The ways of sharing that occur; none in a dense model."""
        return frozenset() if self.expert_layout == "dense" else ways_of(self.sharing)

    @property
    def has_pool(self) -> bool:
        """Whether layers combine a pool of banks."""
        return any(way.combines for way in self.ways)

    @property
    def has_coefficients(self) -> bool:
        """Whether layers have coefficients of what they share."""
        return any(way.mixes for way in self.ways)

    @property
    def shares_experts(self) -> bool:
        """Whether layers share any experts."""
        return any(way.is_shared for way in self.ways)
