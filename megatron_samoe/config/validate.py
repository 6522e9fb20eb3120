"""Rules that a configuration must keep, each a small named function; all broken ones are reported at once.

They are arithmetic on the configuration and the world size, run before any process group is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_samoe.config.derived import (
    data_parallel_size,
    divisors,
    flag,
    global_batch_size,
    num_micro_batches,
    num_moe_layers,
    parse_stage_layout,
    virtual_stages,
)
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.errors import ConfigError, ConfigErrors

Problems = Iterator[ConfigError]


def validate(config: PretrainConfig, world_size: int) -> None:
    """Raises ConfigErrors naming every rule that the configuration breaks on `world_size` ranks."""
    problems = [problem for rule in RULES for problem in rule(config, world_size)]
    if problems:
        raise ConfigErrors(problems)


def _positive_sizes(config: PretrainConfig, world_size: int) -> Problems:
    positive = {
        "model": ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "num_query_groups",
                  "seq_length", "max_position_embeddings", "make_vocab_size_divisible_by"),
        "moe": ("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size",
                "num_expert_banks", "pool_replica_check_interval"),
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
                     "samoe_coefficient_lr_mult": optimizer.samoe_coefficient_lr_mult,
                     "train_iters": training.train_iters, "eval_iters": training.eval_iters,
                     "num_workers": config.data.num_workers}  # fmt: skip
    for name, value in at_least_zero.items():
        if not (value >= 0 and math.isfinite(value)):
            yield ConfigError(flag(name), value, "must be a finite number, 0 or more")
    above_zero = {"norm_epsilon": model.norm_epsilon, "init_method_std": model.init_method_std,
                  "adam_eps": optimizer.adam_eps, "rotary_base": model.rotary_base,
                  "distributed_timeout_minutes": config.parallel.distributed_timeout_minutes,
                  "moe_expert_capacity_factor": moe.moe_expert_capacity_factor,
                  "exit_duration_in_mins": training.exit_duration_in_mins, "loss_scale": training.loss_scale,
                  "initial_loss_scale": training.initial_loss_scale}  # fmt: skip
    for name, number in above_zero.items():
        if number is not None and not (number > 0 and math.isfinite(number)):
            yield ConfigError(flag(name), number, "must be a finite number above 0")


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
    if model.num_query_groups != 1 and not model.group_query_attention:
        yield ConfigError("--num-query-groups", model.num_query_groups, "needs --group-query-attention")
    if model.position_embedding_type == "rope":
        if heads < 1:
            return
        rotated = model.head_dim * model.rotary_percent
        if not 0 < model.rotary_percent <= 1 or rotated != int(rotated) or int(rotated) % 2:
            yield ConfigError("--rotary-percent", model.rotary_percent,
                              f"must leave an even, whole number of the {model.head_dim} head channels to rotate")  # fmt: skip
    if model.position_embedding_type == "learned_absolute" and model.max_positions < model.seq_length:
        yield ConfigError("--max-position-embeddings", model.max_positions,
                          f"must be at least --seq-length {model.seq_length} with learned positions")  # fmt: skip


def _moe_sizes(config: PretrainConfig, world_size: int) -> Problems:
    moe = config.moe
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
    if moe.moe_router_topk > moe.num_experts:
        yield ConfigError("--moe-router-topk", moe.moe_router_topk, f"must be at most --num-experts {moe.num_experts}")
    if moe.moe_router_topk == 1 and not moe.pre_softmax:
        yield ConfigError("--moe-router-pre-softmax", False, "must be true with --moe-router-topk 1: the score of one expert "
                          "among the chosen is always 1, so the router would learn nothing")  # fmt: skip
    if moe.has_pool and moe.samoe_granularity == "layer" and moe.num_expert_banks > max(layers, 1):
        yield ConfigError("--num-expert-banks", moe.num_expert_banks,
                          f"must be at most the number of MoE layers, {layers}: more banks than layers save nothing")  # fmt: skip


def _options_without_effect(config: PretrainConfig, world_size: int) -> Problems:
    """An option that would be ignored is an error: the user meant something by it."""
    moe, default = config.moe, MoEConfig()
    if not moe.has_pool:
        for name in ("num_expert_banks", "samoe_combine", "samoe_granularity", "samoe_normalization", "samoe_init",
                     "samoe_freeze_coefficients", "samoe_pool_placement", "pool_replica_check_interval"):  # fmt: skip
            if getattr(moe, name) != getattr(default, name):
                yield ConfigError(
                    flag(name), getattr(moe, name), f"needs --expert-layout samoe, not {moe.expert_layout}"
                )
    trains_coefficients = moe.has_pool and not moe.samoe_freeze_coefficients
    if config.optimizer.samoe_coefficient_lr_mult != 1.0 and not trains_coefficients:
        yield ConfigError("--samoe-coefficient-lr-mult", config.optimizer.samoe_coefficient_lr_mult,
                          "needs --expert-layout samoe with coefficients that are trained")  # fmt: skip
    if moe.moe_router_load_balancing_type == "none" and moe.moe_aux_loss_coeff != default.moe_aux_loss_coeff:
        yield ConfigError(
            "--moe-aux-loss-coeff", moe.moe_aux_loss_coeff, "has no use with --moe-router-load-balancing-type none"
        )
    if moe.expert_layout == "dense":
        for name in ("moe_router_topk", "moe_router_score_function",
                     "moe_router_pre_softmax", "moe_z_loss_coeff",
                     "moe_input_jitter_eps", "moe_router_load_balancing_type", "moe_ffn_hidden_size",
                     "moe_expert_capacity_factor", "moe_shared_expert_intermediate_size"):  # fmt: skip
            if getattr(moe, name) != getattr(default, name):
                yield ConfigError(flag(name), getattr(moe, name), "needs --expert-layout moe or samoe, not dense")
    if moe.moe_expert_capacity_factor is None and moe.moe_token_drop_policy != default.moe_token_drop_policy:
        yield ConfigError("--moe-token-drop-policy", moe.moe_token_drop_policy, "needs --moe-expert-capacity-factor")
    if config.model.add_qkv_bias and not config.model.disable_bias_linear:
        yield ConfigError("--add-qkv-bias", True, "needs --disable-bias-linear; without it every projection has a bias")
    if moe.pool_replica_check_interval is not None and moe.samoe_pool_placement != "replicated":
        yield ConfigError("--pool-replica-check-interval", moe.pool_replica_check_interval,
                          "needs --samoe-pool-placement replicated: a shared-out pool has no copies to compare")  # fmt: skip
    if config.training.recompute_num_layers is not None and config.training.recompute_granularity != "full":
        yield ConfigError(
            "--recompute-num-layers", config.training.recompute_num_layers, "needs --recompute-granularity full"
        )
    if config.optimizer.lr_wsd_decay_iters is not None and config.optimizer.lr_decay_style != "WSD":
        yield ConfigError("--lr-wsd-decay-iters", config.optimizer.lr_wsd_decay_iters, "needs --lr-decay-style WSD")
    if not config.training.fp16:
        for name in ("loss_scale", "initial_loss_scale"):
            if getattr(config.training, name) != getattr(TrainingConfig(), name):
                yield ConfigError(flag(name), getattr(config.training, name), "needs --fp16")
    if config.model.position_embedding_type != "rope":
        for name in ("rotary_base", "rotary_percent"):
            if getattr(config.model, name) != getattr(ModelConfig(), name):
                yield ConfigError(flag(name), getattr(config.model, name), "needs --position-embedding-type rope")
    if config.data.tokenizer_type == "ByteTokenizer" and config.data.tokenizer_model is not None:
        yield ConfigError(
            "--tokenizer-model", config.data.tokenizer_model, "has no use with --tokenizer-type ByteTokenizer"
        )


def _world_divides(config: PretrainConfig, world_size: int) -> Problems:
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tp
    if min(tp, ep, etp, pp) < 1:
        return
    if world_size % pp:
        yield ConfigError("--pipeline-model-parallel-size", pp, f"must divide the world of {world_size} ranks "
                          f"(start a multiple of {pp} processes, or set it to one of {divisors(world_size)})")  # fmt: skip
        return
    if world_size % (tp * pp):
        # Expert groups of a layout that does not fit would only repeat the complaint.
        over = f" over --pipeline-model-parallel-size {pp}" if pp > 1 else ""
        yield ConfigError("--tensor-model-parallel-size", tp, f"must divide the world of {world_size} ranks{over} "
                          f"(start a multiple of {tp * pp} processes, or set it to one of {divisors(world_size // pp)})")  # fmt: skip
        return
    if etp not in (1, tp):
        yield ConfigError("--expert-tensor-parallel-size", etp, f"must be 1 or --tensor-model-parallel-size {tp}")
    elif world_size % (etp * ep * pp):
        yield ConfigError("--expert-model-parallel-size", ep, f"must divide the world of {world_size} ranks over "
                          f"--expert-tensor-parallel-size {etp} and --pipeline-model-parallel-size {pp}: "
                          f"one of {divisors(max(world_size // (etp * pp), 1))}")  # fmt: skip


def _matrices_divide(config: PretrainConfig, world_size: int) -> Problems:
    model, moe, parallel = config.model, config.moe, config.parallel
    tp, ep, etp = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size, parallel.expert_tp
    if min(tp, ep, etp) < 1:
        return
    checks = [("num_attention_heads", model.num_attention_heads, tp), ("ffn_hidden_size", model.mlp_size, tp),
              ("make_vocab_size_divisible_by", model.make_vocab_size_divisible_by, tp)]  # fmt: skip
    if model.group_query_attention:
        checks.append(("num_query_groups", model.num_query_groups, tp))
    for name, value, size in checks:
        if value % size:
            yield ConfigError(flag(name), value, f"must be divisible by --tensor-model-parallel-size {size}")
    if moe.expert_layout == "dense":
        if ep != 1:
            yield ConfigError("--expert-model-parallel-size", ep, "must be 1 with --expert-layout dense")
        return
    if moe.num_experts % ep:
        yield ConfigError("--num-experts", moe.num_experts, f"must be divisible by --expert-model-parallel-size {ep}")
    expert_size = moe.moe_ffn_hidden_size or model.mlp_size
    if expert_size % etp:
        yield ConfigError(
            "--moe-ffn-hidden-size", expert_size, f"must be divisible by --expert-tensor-parallel-size {etp}"
        )
    shared = moe.moe_shared_expert_intermediate_size
    if shared is not None and shared % tp:
        yield ConfigError("--moe-shared-expert-intermediate-size", shared,
                          f"must be divisible by --tensor-model-parallel-size {tp}")  # fmt: skip
    tokens = config.training.micro_batch_size * model.seq_length
    if etp != tp and tokens % tp:
        yield ConfigError("--micro-batch-size", config.training.micro_batch_size,
                          f"micro batch x sequence = {tokens} tokens must be divisible by --tensor-model-parallel-size {tp} "
                          "with --expert-tensor-parallel-size 1")  # fmt: skip


def _expert_overlap(config: PretrainConfig, world_size: int) -> Problems:
    moe, parallel = config.moe, config.parallel
    ep, chunks = parallel.expert_model_parallel_size, parallel.moe_dispatch_chunks
    if ep < 1 or moe.num_experts % ep:
        return
    for name in ("moe_dispatch_chunks", "moe_shared_expert_overlap"):
        if getattr(parallel, name) != getattr(ParallelConfig(), name) and ep == 1:
            yield ConfigError(flag(name), getattr(parallel, name), "needs --expert-model-parallel-size above 1")
    if ep > 1 and chunks > moe.num_experts // ep:
        yield ConfigError("--moe-dispatch-chunks", chunks, f"must be at most the {moe.num_experts // ep} experts that "
                          f"each of --expert-model-parallel-size {ep} ranks holds")  # fmt: skip
    if parallel.moe_shared_expert_overlap and moe.moe_shared_expert_intermediate_size is None:
        yield ConfigError("--moe-shared-expert-overlap", True, "needs --moe-shared-expert-intermediate-size")


def _pipeline(config: PretrainConfig, world_size: int) -> Problems:
    parallel, layers = config.parallel, config.model.num_layers
    pp, per_stage = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    tp = parallel.tensor_model_parallel_size
    if min(pp, tp, layers, per_stage or 1) < 1 or world_size % (pp * tp):
        return
    if pp == 1:
        for name in ("num_layers_per_virtual_pipeline_stage", "pipeline_model_parallel_layout"):
            if getattr(parallel, name) is not None:
                yield ConfigError(flag(name), getattr(parallel, name), "needs --pipeline-model-parallel-size above 1")
        if parallel.pipeline_schedule != "1f1b":
            yield ConfigError(
                "--pipeline-schedule", parallel.pipeline_schedule, "needs --pipeline-model-parallel-size above 1"
            )
        return
    layout = parallel.pipeline_model_parallel_layout
    if layout is not None:
        if per_stage is not None:
            yield ConfigError(
                "--num-layers-per-virtual-pipeline-stage", per_stage, "excludes --pipeline-model-parallel-layout"
            )
        try:
            counts = parse_stage_layout(layout)
        except ConfigError as error:
            yield error
            return
        if sum(counts) != layers:
            yield ConfigError(
                "--pipeline-model-parallel-layout", layout, f"has {sum(counts)} layers; --num-layers is {layers}"
            )
        if len(counts) % pp:
            yield ConfigError("--pipeline-model-parallel-layout", layout, f"has {len(counts)} stages; a multiple of "
                              f"--pipeline-model-parallel-size {pp} is needed")  # fmt: skip
        stages = len(counts)
    else:
        stages = virtual_stages(parallel, layers)
        if stages == 0 and per_stage is None:
            yield ConfigError("--pipeline-model-parallel-size", pp, f"must divide --num-layers {layers} "
                              f"(one of {divisors(layers)}), or give --pipeline-model-parallel-layout")  # fmt: skip
        elif stages == 0:
            legal = [d for d in divisors(layers) if layers % (pp * d) == 0]
            yield ConfigError("--num-layers-per-virtual-pipeline-stage", per_stage,
                              f"times --pipeline-model-parallel-size {pp} must divide --num-layers {layers}: one of {legal}")  # fmt: skip
    if stages > pp and parallel.pipeline_schedule == "gpipe":
        yield ConfigError("--pipeline-schedule", "gpipe", "has no virtual stages; use 1f1b")
    micro_batches = num_micro_batches(config, world_size) if config.training.micro_batch_size > 0 else 0
    if stages > pp and micro_batches % pp:
        yield ConfigError("--global-batch-size", global_batch_size(config, world_size),
                          f"makes {micro_batches} micro-batches per step; interleaved virtual stages need a multiple of "
                          f"--pipeline-model-parallel-size {pp}")  # fmt: skip


def _sequence_parallel(config: PretrainConfig, world_size: int) -> Problems:
    tp = config.parallel.tensor_model_parallel_size
    tokens = config.training.micro_batch_size * config.model.seq_length
    if not config.parallel.sequence_parallel:
        return
    if tp == 1:
        yield ConfigError("--sequence-parallel", True, "needs --tensor-model-parallel-size above 1")
    elif tp > 1 and tokens % tp:
        yield ConfigError("--micro-batch-size", config.training.micro_batch_size,
                          f"micro batch x sequence = {tokens} tokens must be divisible by --tensor-model-parallel-size {tp} "
                          "with --sequence-parallel")  # fmt: skip


def _batches_divide(config: PretrainConfig, world_size: int) -> Problems:
    parallel = config.parallel
    if min(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) < 1:
        return
    dp = data_parallel_size(config, world_size)
    per_pass = config.training.micro_batch_size * dp
    total = global_batch_size(config, world_size)
    if per_pass > 0 and total % per_pass:
        yield ConfigError("--global-batch-size", total, f"must be a multiple of --micro-batch-size "
                          f"{config.training.micro_batch_size} x data-parallel size {dp} = {per_pass}")  # fmt: skip


def _schedule_fits(config: PretrainConfig, world_size: int) -> Problems:
    optimizer, training = config.optimizer, config.training
    decay = optimizer.lr_decay_iters or training.train_iters
    if optimizer.lr_decay_style == "constant":
        for name in ("min_lr", "lr_decay_iters"):
            if getattr(optimizer, name):
                yield ConfigError(flag(name), getattr(optimizer, name), "has no use with --lr-decay-style constant")
    if optimizer.min_lr > optimizer.lr:
        yield ConfigError("--min-lr", optimizer.min_lr, f"must be at most --lr {optimizer.lr}")
    if optimizer.lr_warmup_fraction is not None:
        if not 0 <= optimizer.lr_warmup_fraction <= 1:
            yield ConfigError("--lr-warmup-fraction", optimizer.lr_warmup_fraction, "must be from 0 to 1")
        if optimizer.lr_warmup_iters:
            yield ConfigError("--lr-warmup-fraction", optimizer.lr_warmup_fraction, "excludes --lr-warmup-iters")
    elif optimizer.lr_warmup_iters > decay:
        yield ConfigError("--lr-warmup-iters", optimizer.lr_warmup_iters, f"must be at most the {decay} decay steps")


def _precision(config: PretrainConfig, world_size: int) -> Problems:
    if config.training.bf16 and config.training.fp16:
        yield ConfigError("--fp16", True, "excludes --bf16")


def _data_sources(config: PretrainConfig, world_size: int) -> Problems:
    data = config.data
    split_paths = data.train_data_path or data.valid_data_path or data.test_data_path
    if data.mock_data and (data.data_path or split_paths):
        yield ConfigError("--mock-data", True, "excludes --data-path and its per-split variants")
    if data.data_path and split_paths:
        yield ConfigError(
            "--data-path", data.data_path, "excludes --train-data-path, --valid-data-path, --test-data-path"
        )
    if not (data.mock_data or data.data_path or data.train_data_path):
        yield ConfigError("--data-path", None, "must name a dataset (or give --train-data-path, or --mock-data)")
    if data.tokenizer_type == "GPT2BPETokenizer" and not (data.vocab_file and data.merge_file):
        yield ConfigError("--tokenizer-type", data.tokenizer_type, "needs --vocab-file and --merge-file")
    if data.tokenizer_type in ("SentencePieceTokenizer", "HuggingFaceTokenizer") and not data.tokenizer_model:
        yield ConfigError("--tokenizer-type", data.tokenizer_type, "needs --tokenizer-model")


def _checkpoint_paths(config: PretrainConfig, world_size: int) -> Problems:
    checkpoint = config.checkpoint
    if checkpoint.save is None:
        for name in ("save_interval", "save_retain_interval", "keep_last", "no_save_optim", "async_save"):
            if getattr(checkpoint, name):
                yield ConfigError(flag(name), getattr(checkpoint, name), "needs --save or --run-dir")
    if config.training.skip_train and (checkpoint.load is None or config.training.eval_iters == 0):
        yield ConfigError("--skip-train", True, "needs --load (or --run-dir) and --eval-iters: it only evaluates")
    if checkpoint.load is None:
        for name in ("ckpt_step", "finetune", "no_load_optim", "no_load_rng", "use_checkpoint_args",
                     "exit_on_missing_checkpoint"):  # fmt: skip
            if getattr(checkpoint, name):
                yield ConfigError(flag(name), getattr(checkpoint, name), "needs --load or --run-dir")


RULES = (
    _positive_sizes,
    _number_ranges,
    _attention_sizes,
    _moe_sizes,
    _options_without_effect,
    _world_divides,
    _matrices_divide,
    _expert_overlap,
    _pipeline,
    _sequence_parallel,
    _batches_divide,
    _schedule_fits,
    _precision,
    _data_sources,
    _checkpoint_paths,
)
