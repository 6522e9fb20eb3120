"""The router: which experts each token visits, and with what weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.moe.balance import BalanceStrategy, entropy_sum
from megatron_samoe.moe.candidates import candidate_schedule
from megatron_samoe.moe.capacity import drop_over_capacity, expert_capacity
from megatron_samoe.moe.scores import score_of
from megatron_samoe.moe.set_loads import SetColumns, count
from megatron_samoe.moe.types import ForwardContext, MoELayerSpec, MoEStats
from megatron_samoe.ops.topk_gate import ChoiceRule, GateResult, limited
from megatron_samoe.parallel_state.parameter_tag import ZEROS, Init, ParameterTag
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import new_parameter, token_wise_spec
from megatron_samoe.tensor_parallel.mappings import gather_sequences, gather_tokens, own_tokens


@dataclass(frozen=True)
class Routing:
    """The router's decision for one micro-batch.

    Attributes:
        ids_TK: chosen experts; -1 where a choice was dropped or there was none. Such a choice adds nothing to the token's
            output, and the weights of its other choices stay as they are.
        probs_TK: weight of each choice.
        auxiliary_loss: scalar to be added to the training loss, or None.
        loads_BC: loads of shared sets with this layer's, where they are balanced over layers; see `set_loads`.
    """

    ids_TK: Tensor
    probs_TK: Tensor
    auxiliary_loss: Tensor | None
    stats: MoEStats
    loads_BC: Tensor | None = None


class Router(nn.Module):
    """Scores tokens against E expert vectors, in fp32 whatever the model's dtype, and takes the best K.

    All tensor- and context-parallel ranks of a sequence route all of it equally. Another way to choose overrides `select`.
    """

    #: Numbers of each sum that routers report, by name; "counts" has one for each expert.
    statistics: ClassVar[Mapping[str, int]] = {"z_sum": 1, "dropped": 1}
    #: Parameters whose first dim counts experts, which the lock of a pool gives other numbers.
    by_expert: ClassVar[Sequence[str]] = ("weight", "expert_bias", "candidates")
    #: What some scores learn, see `scores`.
    scale: nn.Parameter
    loss_weight: nn.Parameter

    def __init__(
        self, config: MoEConfig, spec: MoELayerSpec, balance: BalanceStrategy, state: ParallelState, dtype: torch.dtype
    ):
        super().__init__()
        self.config, self.spec, self.balance, self.state = config, spec, balance, state
        self.score = score_of(config)
        dtype = torch.promote_types(dtype, torch.float32)
        num_experts = spec.shape.num_experts
        tag = ParameterTag(token_wise_spec(state), Init(std=spec.router_init_std))
        self.weight = new_parameter((num_experts, spec.shape.hidden_size), tag, state, dtype)
        if config.moe_router_enable_expert_bias:
            self.expert_bias = new_parameter((num_experts,), ParameterTag(init=ZEROS), state, dtype)
            self.expert_bias.requires_grad_(False)
        schedule = candidate_schedule(config)
        if schedule is not None:
            factors = Init(mean=schedule.start(spec.moe_index, num_experts))
            self.candidates = new_parameter((num_experts,), ParameterTag(init=factors), state, dtype)
            self.candidates.requires_grad_(False)
        self.score.prepare(self, num_experts, dtype)

    @property
    def place(self) -> MoELayerSpec:
        """The former name of `spec`."""
        warnings.warn(
            "Router.place is now Router.spec; version 0.3 knows only the new name.", FutureWarning, stacklevel=2
        )
        return self.spec

    @property
    def experts_per_token(self) -> float:
        """Experts that a token visits on average."""
        return self.score.topk

    @property
    def kept_choices(self) -> tuple[float, int]:
        """Experts that a token may visit on average, at the worst time of a run, and the width of ids and weights."""
        return self.score.kept_choices(self.spec.shape.num_experts)

    def select(self, logits_TE: Tensor, num_sequences: int) -> GateResult:
        """Returns the choice of T tokens, which are complete sequences; see `ops.topk_gate.described`."""
        return self.score.select(logits_TE, num_sequences, self)

    def rule(self) -> ChoiceRule:
        """Returns how the configuration and the biases choose."""
        config = self.config
        return ChoiceRule(
            self.score.topk,
            config.moe_router_score_function,
            config.pre_softmax,
            self.expert_bias if config.moe_router_enable_expert_bias else None,
            config.moe_router_num_groups or 0,
            config.moe_router_group_topk or 0,
            config.weight_factor,
            getattr(self, "candidates", None),
        )

    @torch.no_grad()
    def after_step(self, counts_E: Tensor, visited: Tensor) -> None:
        """Moves expert biases after an optimizer step, by the loads of its global batch (DeepSeek-V3, arXiv:2412.19437), and the
        weight of the loss that keeps experts few (ReMoE).

        Args:
            visited: experts that a token of the batch visited, on average over all layers; a scalar.
        """
        self.score.after_step(visited, self)
        if self.config.moe_router_enable_expert_bias:
            counts_E = counts_E.to(self.expert_bias)
            # An expert that cannot be chosen has no load to be moved by.
            open_E = self.candidates > 0 if hasattr(self, "candidates") else torch.ones_like(counts_E, dtype=torch.bool)
            mean = (counts_E * open_E).sum() / open_E.sum()
            moves_E = (mean - counts_E).sign() * open_E
            self.expert_bias.add_(moves_E, alpha=self.config.moe_router_bias_update_rate)

    def forward(self, x_TH: Tensor, context: ForwardContext, loads_BC: Tensor | None = None) -> Routing:
        """Returns the routing of the T tokens that this rank's tensor-parallel group has, also where x_TH is a share of them.

        Losses, loads and capacities are of complete sequences, so all context-parallel ranks of a sequence route all of it.

        Args:
            loads_BC: loads of shared sets in the layers before this one, where they are balanced over layers.
        """
        config, num_experts = self.config, self.spec.shape.num_experts
        x_TH = x_TH.to(self.weight.dtype)
        if context.training and config.moe_input_jitter_eps:
            x_TH = self._jitter(x_TH, context)
        logits_TE = self.score.logits(F.linear(x_TH, self.weight), self)
        if hasattr(self, "candidates"):
            logits_TE = limited(logits_TE, self.candidates, self.score.is_linear)
        if self.state.sequence_parallel:
            logits_TE = gather_tokens(logits_TE, self.state.tp)
        logits_TE = gather_sequences(logits_TE, self.state, context.batch_size)
        gate = self.select(logits_TE, context.batch_size)
        if len(gate.counts_GE) != context.batch_size:
            raise ValueError(f"select counted in {len(gate.counts_GE)} groups, not in {context.batch_size} sequences")
        chosen_TK = ids_TK = gate.ids_TK
        if context.training and config.moe_expert_capacity_factor is not None:
            slots = int(len(ids_TK) // context.batch_size * self.experts_per_token)
            capacity = expert_capacity(slots, num_experts, config.moe_expert_capacity_factor)
            ids_TK = drop_over_capacity(
                ids_TK, gate.probs_TK, capacity, context.batch_size, num_experts, config.moe_token_drop_policy
            )
        loss, sums = self.balance(gate, context)
        if context.training and config.pool_lock_entropy_coeff:
            entropy_loss = self._entropy_loss(gate, context)
            loss = entropy_loss if loss is None else loss + entropy_loss
        sums |= {"counts": gate.counts_GE.sum(0), "z_sum": gate.z_sum.detach()}
        none_dropped = ids_TK is chosen_TK
        sums["dropped"] = sums["counts"].new_zeros(()) if none_dropped else ((ids_TK < 0) & (chosen_TK >= 0)).sum()
        columns = self.spec.set_columns
        if loads_BC is not None and columns is not None:
            factor = self._set_factor(columns, len(logits_TE) // context.batch_size, context)
            loads_BC = count(loads_BC, columns, gate.counts_GE, gate.score_sum_GE, factor)
        ids_TK, probs_TK = (own_tokens(t, self.state, context.batch_size) for t in (ids_TK, gate.probs_TK))
        return Routing(ids_TK, probs_TK, loss, MoEStats(self.spec.moe_index, sums), loads_BC)

    def _set_factor(self, columns: SetColumns, tokens_per_sequence: int, context: ForwardContext) -> float:
        """Returns what the loads of all layers are multiplied by to be the gradient of a sequence's summed scores."""
        config, num_experts = self.config, self.spec.shape.num_experts
        if config.moe_router_load_balancing_type == "none":
            return 0.0
        share = num_experts / (tokens_per_sequence * self.score.topk * columns.num_layers)
        return context.gradient_scale * config.moe_aux_loss_coeff * share / context.tokens_per_step

    def _entropy_loss(self, gate: GateResult, context: ForwardContext) -> Tensor:
        """Returns this micro-batch's share of a layer's entropy loss, weighted; see `pool_lock_entropy_coeff`."""
        config, columns = self.config, self.spec.set_columns
        assert columns is not None and context.random is not None and config.pool_lock_step is not None
        weight = config.pool_lock_entropy_coeff * min(context.random.iteration / config.pool_lock_step, 1.0)
        tokens_per_sequence = len(gate.ids_TK) // context.batch_size
        target = self.spec.shape.num_experts / columns.num_layers
        found = entropy_sum(gate.score_sum_GE, target, config.pool_lock_entropy_group_size or 1, self.state.dp)
        return weight / columns.num_layers * tokens_per_sequence / context.tokens_per_step * found

    def _jitter(self, x_TH: Tensor, context: ForwardContext) -> Tensor:
        assert context.random is not None
        eps = self.config.moe_input_jitter_eps
        noise = context.random.uniform_like(x_TH, self.spec.layer, "jitter", self.state.token_share)
        return x_TH * noise.mul_(2 * eps).add_(1 - eps).to(x_TH.dtype)
