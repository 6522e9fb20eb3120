"""Options: how layers share, and those of Megatron-Core with which they cannot, or with which nobody has run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import words_with
from megatron_samoe.config.typed import typed
from megatron_samoe.config.validate import refuse_wrong_numbers
from megatron_samoe.errors import ConfigError


@dataclass(frozen=True)
class Refusal:
    """An option of Megatron-Core, when it is refused, and why."""

    option: str
    is_wrong: Callable[[Any], bool]
    why: str


def _is_on(value: Any) -> bool:
    return bool(value) and value != "none"


NOT_PARAMETERS = "meets lent experts, which are not parameters of their layer"
#: Of a TransformerConfig.
OF_MODEL = (
    Refusal("num_moe_experts", lambda v: v is None, "must be given: a model without experts has none to share"),
    Refusal("add_bias_linear", _is_on, "must be False: shared experts have no biases here"),
    Refusal("mtp_num_layers", _is_on, "must be None: layers that predict further tokens do not borrow experts"),
    Refusal("moe_apply_probs_on_input", _is_on, "must be False: lent experts weigh their results"),
    Refusal("fp8", _is_on, f"{NOT_PARAMETERS}; train in bf16 or fp32"),
    Refusal("fp4", _is_on, f"{NOT_PARAMETERS}; train in bf16 or fp32"),
    Refusal("delay_wgrad_compute", _is_on, NOT_PARAMETERS),
    Refusal("overlap_dispatch_backward_with_experts_wgrad", _is_on, NOT_PARAMETERS),
    Refusal("cuda_graph_impl", _is_on, NOT_PARAMETERS),
    Refusal("activation_func_clamp_value", _is_on, "must be None: lent experts do not clamp"),
    Refusal("glu_linear_offset", _is_on, "must be 0: lent experts have no offset"),
    Refusal("use_mup", _is_on, "must be False: lent experts are not drawn by it"),
    Refusal("moe_latent_size", _is_on, "must be None: lent experts have the hidden size of the model"),
    Refusal("context_parallel_size", lambda v: v > 1, "must be 1: nobody has run it"),
    Refusal("moe_token_dispatcher_type", lambda v: v == "flex", "must be alltoall or allgather: nobody has run flex"),
)
#: Of a TransformerConfig where candidates change.
OF_CANDIDATES = (
    Refusal("moe_router_num_groups", lambda v: v is not None, "must be None: a group may have no open expert"),
    Refusal("moe_expert_capacity_factor", lambda v: v is not None, "must be None: capacities count on all experts"),
    Refusal(
        "moe_router_load_balancing_type",
        lambda v: not {"sinkhorn", "quantile_balancing"}.isdisjoint([v] if isinstance(v, str) else v),
        "must not be sinkhorn or quantile_balancing, which open closed experts",
    ),
    Refusal("moe_router_enable_expert_bias", _is_on, "must be False: a closed expert's bias grows until it is chosen"),
    Refusal(
        "moe_router_score_function", lambda v: v == "sqrtsoftplus", "must be softmax or sigmoid: nobody has run it"
    ),
)
#: Of a TransformerConfig that a schedule has used.
OF_SCHEDULE = (
    Refusal(
        "grad_sync_func",
        lambda v: v is not None,
        "must be None (--no-align-grad-reduce): gradients of shared experts are complete when finalize_model_grads is called",
    ),
)


def sharing_options(config: Any, expert_sharing: str, options: Mapping[str, Any], num_layers: int) -> MoEConfig:
    """Returns the options of sharing, for a model with a number of MoE layers.

    Raises:
        ConfigError: an option is unknown or out of range, has no effect with this way, or does not fit the model.
    """
    fixed = {"expert_layout": "moe", "expert_sharing": expert_sharing, "samoe_pool_placement": "replicated"}
    moe = typed(MoEConfig, {**options, **fixed}, "ExpertSharing")
    refuse_wrong_numbers(replace(PretrainConfig(), moe=moe))
    experts, topk = config.num_moe_experts, config.moe_router_topk
    for name, value in options.items():
        if (words := words_with(name)) and not moe.sharing_reads(name):
            raise ConfigError(name, value, f"has an effect with expert_sharing {words} only")
    for name in ("pool_lock_vote_steps", "pool_lock_entropy_coeff"):
        if (value := getattr(moe, name)) > (least := getattr(MoEConfig, name)):
            raise ConfigError(
                name, value, f"must be {least} here: Megatron-Core's routers keep no votes and have losses of their own"
            )
    if moe.pool_lock_step is not None or moe.neighbour_unmask_steps:
        refuse(config, OF_CANDIDATES)
    if moe.pool_lock_step is not None and (experts % num_layers or experts < topk * num_layers):
        allowed = f"must be a multiple of the {num_layers} MoE layers, with at least moe_router_topk {topk} for each"
        raise ConfigError("num_moe_experts", experts, f"{allowed}, with pool_lock_step")
    if moe.sharing_reads("num_neighbour_layers"):
        block = moe.num_neighbour_layers
        if num_layers % block:
            raise ConfigError("num_neighbour_layers", block, f"must divide the {num_layers} MoE layers")
        if experts % block or experts < topk * block:
            allowed = (
                f"must be a multiple of num_neighbour_layers {block}, with at least moe_router_topk {topk} for each"
            )
            raise ConfigError("num_moe_experts", experts, f"{allowed}: it counts the experts of a block")
        experts //= block
    return replace(moe, num_experts=experts)


def refuse(config: Any, rows: tuple[Refusal, ...]) -> None:
    """Raises ConfigError naming the first option that is refused; options that this version lacks are off."""
    for row in rows:
        if hasattr(config, row.option) and row.is_wrong(value := getattr(config, row.option)):
            raise ConfigError(row.option, value, row.why)
