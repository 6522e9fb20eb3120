"""The conditions without which an option has no effect. An option that would be ignored is an error: the user meant
something by it.
"""

from __future__ import annotations

from megatron_samoe.config.option import Need
from megatron_samoe.config.sharing_map import words_with

#: Of a `PretrainConfig`, whose groups are made of these options.
_NOT = ", not {c.moe.expert_layout}"
MOE_LAYOUT = Need(lambda c: c.moe.expert_layout == "moe", "needs --expert-layout moe" + _NOT)
POOL = Need(lambda c: c.moe.has_pool, "needs --expert-layout samoe, or --expert-sharing with combined layers" + _NOT)
COEFFICIENTS = Need(
    lambda c: c.moe.has_coefficients, "needs --expert-layout samoe, or --expert-sharing combined or scaled" + _NOT
)
SHARING = Need(lambda c: c.moe.shares_experts, "needs --expert-layout samoe, or --expert-sharing other than own" + _NOT)


def _read_by_sharing(option: str) -> Need:
    return Need(lambda c: c.moe.sharing_reads(option), f"needs --expert-sharing {words_with(option)}")


SETS = _read_by_sharing("num_expert_sets")
RELU = Need(lambda c: c.moe.moe_router_score_function == "relu", "needs --moe-router-score-function relu")
NEIGHBOURS = _read_by_sharing("num_neighbour_layers")
ONE_POOL = _read_by_sharing("pool_lock_step")
POOL_LOCK = Need(lambda c: c.moe.pool_lock_step is not None, "needs --pool-lock-step")
TRAINED_COEFFICIENTS = Need(
    lambda c: c.moe.has_coefficients and not c.moe.samoe_freeze_coefficients,
    "needs --expert-layout samoe, or --expert-sharing combined or scaled, with coefficients that are trained",
)
EXPERTS = Need(lambda c: c.moe.expert_layout != "dense", "needs --expert-layout moe or samoe, not dense")
EXPERT_BIAS = Need(lambda c: c.moe.moe_router_enable_expert_bias, "needs --moe-router-enable-expert-bias")
EXPERT_GROUPS = Need(lambda c: c.moe.moe_router_num_groups is not None, "needs --moe-router-num-groups")
BALANCE = Need(
    lambda c: c.moe.moe_router_load_balancing_type != "none", "has no use with --moe-router-load-balancing-type none"
)
AUX_LOSS = Need(
    lambda c: c.moe.moe_router_load_balancing_type == "aux_loss",
    "needs --moe-router-load-balancing-type aux_loss",
)
SHARED_EXPERT = Need(
    lambda c: c.moe.moe_shared_expert_intermediate_size is not None, "needs --moe-shared-expert-intermediate-size"
)
CAPACITY = Need(lambda c: c.moe.moe_expert_capacity_factor is not None, "needs --moe-expert-capacity-factor")
ROTARY = Need(lambda c: c.model.position_embedding_type == "rope", "needs --position-embedding-type rope")
ROPE_SCALING = Need(lambda c: c.model.rope_scaling_type is not None, "needs --rope-scaling-type")
LLAMA3_ROPE = Need(lambda c: c.model.rope_scaling_type == "llama3", "needs --rope-scaling-type llama3")
YARN = Need(lambda c: c.model.rope_scaling_type == "yarn", "needs --rope-scaling-type yarn")
TRAINED_LENGTH = Need(
    lambda c: c.model.rope_scaling_type in ("llama3", "yarn"), "needs --rope-scaling-type llama3 or yarn"
)
LATENTS = Need(lambda c: c.model.multi_latent_attention, "needs --multi-latent-attention")
WINDOW = Need(lambda c: c.model.sliding_window is not None, "needs --sliding-window")
QK_NORM = Need(lambda c: c.model.qk_layernorm, "needs --qk-layernorm")
NO_BIAS = Need(
    lambda c: c.model.disable_bias_linear, "needs --disable-bias-linear; without it every projection has a bias"
)
GELU = Need(lambda c: not c.model.swiglu, "has no use with --swiglu, which gates by SiLU")
GROUPED_QUERIES = Need(lambda c: c.model.group_query_attention, "needs --group-query-attention")
FULL_RECOMPUTE = Need(lambda c: c.training.recompute_granularity == "full", "needs --recompute-granularity full")
MUON = Need(lambda c: c.optimizer.optimizer == "muon", "needs --optimizer muon")
TRAIN_SAMPLES = Need(lambda c: c.training.train_samples is not None, "needs --train-samples")
WSD = Need(lambda c: c.optimizer.lr_decay_style == "WSD", "needs --lr-decay-style WSD")
WSD_SAMPLES = Need(
    lambda c: WSD.is_met(c) and TRAIN_SAMPLES.is_met(c), "needs --lr-decay-style WSD and --train-samples"
)
SPIKE_WINDOW = Need(lambda c: c.training.spike_window != 0, "needs --spike-window")
FP16 = Need(lambda c: c.training.fp16, "needs --fp16")
TOKENIZER_FILE = Need(
    lambda c: c.data.tokenizer_type != "ByteTokenizer", "has no use with --tokenizer-type ByteTokenizer"
)
TEACHER = Need(lambda c: c.distillation.teacher is not None, "needs --teacher")
PIPELINE = Need(lambda c: c.parallel.pipeline_model_parallel_size != 1, "needs --pipeline-model-parallel-size above 1")
CONTEXT_PARALLEL = Need(lambda c: c.parallel.context_parallel_size != 1, "needs --context-parallel-size above 1")
EXPERT_PARALLEL = Need(
    lambda c: c.parallel.expert_model_parallel_size != 1, "needs --expert-model-parallel-size above 1"
)
TRACKERS = Need(
    lambda c: c.logging.wandb_project or c.logging.trackio_project, "needs --wandb-project or --trackio-project"
)
PROFILE = Need(lambda c: c.logging.profile, "needs --profile")
SAVE = Need(lambda c: c.checkpoint.save is not None, "needs --save or --run-dir")
LOAD = Need(lambda c: c.checkpoint.load is not None, "needs --load or --run-dir")
