"""The conditions without which an option has no effect. An option that would be ignored is an error: the user meant
something by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_samoe.config.option import Need, flag
from megatron_samoe.config.sharing_map import words_with


def _need(option: str, *values: Any, why: str = "") -> Need:
    """Returns the need of an option, written group.name, with one of some values; with any if none are given."""
    name = option.rpartition(".")[2]
    words = f"needs {' '.join((flag(name), ' or '.join(values))).strip()}{why}"
    return _by_value(option, lambda value: value in values if values else value not in (None, False, 0), words)


def _need_above_1(option: str) -> Need:
    return _by_value(option, lambda value: value != 1, f"needs {flag(option.rpartition('.')[2])} above 1")


def _by_value(option: str, is_met: Callable[[Any], bool], words: str) -> Need:
    group, name = option.split(".")
    return Need(lambda c: is_met(getattr(getattr(c, group), name)), words, (name,))


def _of_sharing(is_met: Callable[[Any], bool], words: str, *options: str) -> Need:
    """Returns the need of a way of sharing experts that the MoE options have, and of other options."""
    return Need(lambda c: is_met(c.moe), words, ("expert_layout", "expert_sharing", *options))


def _of_word(option: str) -> Need:
    return _of_sharing(lambda moe: moe.sharing_reads(option), f"needs --expert-sharing {words_with(option)}")


_NOT = ", not {c.moe.expert_layout}"
MOE_LAYOUT = _need("moe.expert_layout", "moe", why=_NOT)
POOL = _of_sharing(
    lambda moe: moe.has_pool, "needs --expert-layout samoe, or --expert-sharing with combined layers" + _NOT
)
_MIXED = "needs --expert-layout samoe, or --expert-sharing combined or scaled"
COEFFICIENTS = _of_sharing(lambda moe: moe.has_coefficients, _MIXED + _NOT)
TRAINED_COEFFICIENTS = _of_sharing(
    lambda moe: moe.has_coefficients and not moe.samoe_freeze_coefficients,
    f"{_MIXED}, with coefficients that are trained",
    "samoe_freeze_coefficients",
)
SHARING = _of_sharing(
    lambda moe: moe.shares_experts, "needs --expert-layout samoe, or --expert-sharing other than own" + _NOT
)
SETS = _of_word("num_expert_sets")
NEIGHBOURS = _of_word("num_neighbour_layers")
UNMASKING = _need("moe.neighbour_unmask_steps")
ONE_POOL = _of_word("pool_lock_step")
POOL_LOCK = _need("moe.pool_lock_step")
POOL_ENTROPY = _need("moe.pool_lock_entropy_coeff")
EXPERTS = _need("moe.expert_layout", "moe", "samoe", why=", not dense")
RELU = _need("moe.moe_router_score_function", "relu")
EXPERT_BIAS = _need("moe.moe_router_enable_expert_bias")
EXPERT_GROUPS = _need("moe.moe_router_num_groups")
BALANCE = _by_value(
    "moe.moe_router_load_balancing_type",
    lambda kind: kind != "none",
    "has no use with --moe-router-load-balancing-type none",
)
AUX_LOSS = _need("moe.moe_router_load_balancing_type", "aux_loss")
SHARED_EXPERT = _need("moe.moe_shared_expert_intermediate_size")
CAPACITY = _need("moe.moe_expert_capacity_factor")
ROTARY = _need("model.position_embedding_type", "rope")
ROPE_SCALING = _need("model.rope_scaling_type")
LLAMA3_ROPE = _need("model.rope_scaling_type", "llama3")
YARN = _need("model.rope_scaling_type", "yarn")
TRAINED_LENGTH = _need("model.rope_scaling_type", "llama3", "yarn")
LATENTS = _need("model.multi_latent_attention")
WINDOW = _need("model.sliding_window")
QK_NORM = _need("model.qk_layernorm")
NO_BIAS = _need("model.disable_bias_linear", why="; without it every projection has a bias")
GELU = _by_value("model.swiglu", lambda swiglu: not swiglu, "has no use with --swiglu, which gates by SiLU")
GROUPED_QUERIES = _need("model.group_query_attention")
FULL_RECOMPUTE = _need("training.recompute_granularity", "full")
MUON = _need("optimizer.optimizer", "muon")
TRAIN_SAMPLES = _need("training.train_samples")
WSD = _need("optimizer.lr_decay_style", "WSD")
WSD_SAMPLES = Need(
    lambda c: WSD.is_met(c) and TRAIN_SAMPLES.is_met(c),
    "needs --lr-decay-style WSD and --train-samples",
    WSD.reads + TRAIN_SAMPLES.reads,
)
SPIKE_WINDOW = _need("training.spike_window")
FP16 = _need("training.fp16", why=", which needs CUDA")
TOKENIZER_FILE = _by_value(
    "data.tokenizer_type", lambda kind: kind != "ByteTokenizer", "has no use with --tokenizer-type ByteTokenizer"
)
TEACHER = _need("distillation.teacher")
PREFLIGHT = _need("parallel.preflight")
PIPELINE = _need_above_1("parallel.pipeline_model_parallel_size")
CONTEXT_PARALLEL = _need_above_1("parallel.context_parallel_size")
EXPERT_PARALLEL = _need_above_1("parallel.expert_model_parallel_size")
TRACKERS = Need(
    lambda c: c.logging.wandb_project or c.logging.trackio_project,
    "needs --wandb-project or --trackio-project",
    ("wandb_project", "trackio_project"),
)
PROFILE = _need("logging.profile")
SAVE = _need("checkpoint.save", why=" or --run-dir")
LOAD = _need("checkpoint.load", why=" or --run-dir")
