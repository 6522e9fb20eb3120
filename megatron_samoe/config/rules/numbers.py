"""What each number may be, taken alone."""

from __future__ import annotations

import math

from megatron_samoe.config.derived import (
    flag,
)
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Problems
from megatron_samoe.errors import ConfigError


def _positive_sizes(config: PretrainConfig, world_size: int) -> Problems:
    positive = {
        "model": ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "num_query_groups",
                  "seq_length", "max_position_embeddings", "make_vocab_size_divisible_by"),
        "moe": ("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size",
                "num_expert_banks", "pool_replica_check_interval", "moe_aux_loss_group_size"),
        "parallel": ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
                     "expert_tensor_parallel_size", "num_layers_per_virtual_pipeline_stage", "ddp_bucket_size",
                     "moe_dispatch_chunks"),
        "training": ("micro_batch_size", "global_batch_size", "exit_interval", "eval_interval", "num_threads",
                     "recompute_num_layers"),
        "optimizer": ("lr_decay_iters", "lr_wsd_decay_iters"),
        "logging": ("log_interval",),
        "checkpoint": ("save_interval", "save_retain_interval", "keep_last"),
    }  # fmt: skip
    for group, names in positive.items():
        for name in names:
            value = getattr(getattr(config, group), name)
            if value is not None and value < 1:
                yield ConfigError(flag(name), value, "must be a positive integer")


def _number_ranges(config: PretrainConfig, world_size: int) -> Problems:
    model, moe, training, optimizer = config.model, config.moe, config.training, config.optimizer
    probabilities = {"attention_dropout": model.attention_dropout, "hidden_dropout": model.hidden_dropout,
                     "moe_input_jitter_eps": moe.moe_input_jitter_eps, "adam_beta1": optimizer.adam_beta1,
                     "adam_beta2": optimizer.adam_beta2}  # fmt: skip
    for name, value in probabilities.items():
        if not 0 <= value < 1:
            yield ConfigError(flag(name), value, "must be at least 0 and below 1")
    at_least_zero = {"moe_aux_loss_coeff": moe.moe_aux_loss_coeff, "moe_z_loss_coeff": moe.moe_z_loss_coeff,
                     "lr": optimizer.lr, "min_lr": optimizer.min_lr, "weight_decay": optimizer.weight_decay,
                     "clip_grad": optimizer.clip_grad, "lr_warmup_iters": optimizer.lr_warmup_iters,
                     "train_iters": training.train_iters, "eval_iters": training.eval_iters,
                     "num_workers": config.data.num_workers, "seed": training.seed,
                     "spike_window": training.spike_window}  # fmt: skip
    for name, value in at_least_zero.items():
        if not (value >= 0 and math.isfinite(value)):
            yield ConfigError(flag(name), value, "must be a finite number, 0 or more")
    above_zero = {"norm_epsilon": model.norm_epsilon, "init_method_std": model.init_method_std,
                  "adam_eps": optimizer.adam_eps, "rotary_base": model.rotary_base,
                  "distributed_timeout_minutes": config.parallel.distributed_timeout_minutes,
                  "moe_expert_capacity_factor": moe.moe_expert_capacity_factor,
                  "moe_router_init_method_std": moe.moe_router_init_method_std,
                  "moe_router_lr_mult": optimizer.moe_router_lr_mult,
                  "moe_output_lr_mult": optimizer.moe_output_lr_mult,
                  "samoe_bank_lr_mult": optimizer.samoe_bank_lr_mult,
                  "samoe_coefficient_lr_mult": optimizer.samoe_coefficient_lr_mult,
                  "exit_duration_in_mins": training.exit_duration_in_mins, "loss_scale": training.loss_scale,
                  "initial_loss_scale": training.initial_loss_scale, "spike_sigmas": training.spike_sigmas}  # fmt: skip
    for name, number in above_zero.items():
        if number is not None and not (number > 0 and math.isfinite(number)):
            yield ConfigError(flag(name), number, "must be a finite number above 0")


RULES = (_positive_sizes, _number_ranges)
