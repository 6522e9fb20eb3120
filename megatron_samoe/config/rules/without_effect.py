"""An option that would be ignored is an error: the user meant something by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_samoe.config.derived import flag
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Problems
from megatron_samoe.config.training import OptimizerConfig, TrainingConfig
from megatron_samoe.errors import ConfigError


def _changed(group: Any, default: Any, names: Sequence[str], needed: str) -> Problems:
    """Yields a problem for each of some options that has another value than if it was not given."""
    for name in names:
        if getattr(group, name) != getattr(default, name):
            yield ConfigError(flag(name), getattr(group, name), needed)


def _pool_options(config: PretrainConfig, world_size: int) -> Problems:
    moe = config.moe
    if not moe.has_pool:
        names = ("num_expert_banks", "samoe_combine", "samoe_granularity", "samoe_normalization", "samoe_init",
                 "samoe_freeze_coefficients", "samoe_pool_placement", "pool_replica_check_interval")  # fmt: skip
        needed = f"needs --expert-layout samoe, not {moe.expert_layout}"
        yield from _changed(moe, MoEConfig(), names, needed)
        yield from _changed(config.optimizer, OptimizerConfig(), ("samoe_bank_lr_mult",), needed)
    if config.optimizer.samoe_coefficient_lr_mult != 1.0 and not (moe.has_pool and not moe.samoe_freeze_coefficients):
        yield ConfigError("--samoe-coefficient-lr-mult", config.optimizer.samoe_coefficient_lr_mult,
                          "needs --expert-layout samoe with coefficients that are trained")  # fmt: skip
    if moe.pool_replica_check_interval is not None and moe.samoe_pool_placement != "replicated":
        yield ConfigError("--pool-replica-check-interval", moe.pool_replica_check_interval,
                          "needs --samoe-pool-placement replicated: a shared-out pool has no copies to compare")  # fmt: skip


def _expert_options(config: PretrainConfig, world_size: int) -> Problems:
    moe, default = config.moe, MoEConfig()
    if moe.expert_layout == "dense":
        names = ("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_z_loss_coeff",
                 "moe_input_jitter_eps", "moe_router_load_balancing_type", "moe_ffn_hidden_size",
                 "moe_expert_capacity_factor", "moe_shared_expert_intermediate_size", "moe_aux_loss_group_size",
                 "moe_router_init_method_std", "moe_scale_output_init")  # fmt: skip
        needed = "needs --expert-layout moe or samoe, not dense"
        yield from _changed(moe, default, names, needed)
        yield from _changed(config.optimizer, OptimizerConfig(), ("moe_router_lr_mult", "moe_output_lr_mult"), needed)
    if moe.moe_router_load_balancing_type == "none":
        needed = "has no use with --moe-router-load-balancing-type none"
        yield from _changed(moe, default, ("moe_aux_loss_coeff",), needed)
    if moe.moe_router_load_balancing_type != "aux_loss" and moe.expert_layout != "dense":
        yield from _changed(
            moe, default, ("moe_aux_loss_group_size",), "needs --moe-router-load-balancing-type aux_loss"
        )
    if moe.moe_expert_capacity_factor is None:
        yield from _changed(moe, default, ("moe_token_drop_policy",), "needs --moe-expert-capacity-factor")


def _model_options(config: PretrainConfig, world_size: int) -> Problems:
    model = config.model
    if model.add_qkv_bias and not model.disable_bias_linear:
        yield ConfigError("--add-qkv-bias", True, "needs --disable-bias-linear; without it every projection has a bias")
    if model.position_embedding_type != "rope":
        needed = "needs --position-embedding-type rope"
        yield from _changed(model, ModelConfig(), ("rotary_base", "rotary_percent"), needed)


def _training_options(config: PretrainConfig, world_size: int) -> Problems:
    training, optimizer, data = config.training, config.optimizer, config.data
    if training.recompute_num_layers is not None and training.recompute_granularity != "full":
        yield ConfigError("--recompute-num-layers", training.recompute_num_layers, "needs --recompute-granularity full")
    if optimizer.lr_wsd_decay_iters is not None and optimizer.lr_decay_style != "WSD":
        yield ConfigError("--lr-wsd-decay-iters", optimizer.lr_wsd_decay_iters, "needs --lr-decay-style WSD")
    if training.spike_window == 0:
        yield from _changed(training, TrainingConfig(), ("skip_spikes", "spike_sigmas"), "needs --spike-window")
    if not training.fp16:
        yield from _changed(training, TrainingConfig(), ("loss_scale", "initial_loss_scale"), "needs --fp16")
    if data.tokenizer_type == "ByteTokenizer" and data.tokenizer_model is not None:
        yield ConfigError("--tokenizer-model", data.tokenizer_model, "has no use with --tokenizer-type ByteTokenizer")


RULES = (_pool_options, _expert_options, _model_options, _training_options)
