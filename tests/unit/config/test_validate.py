"""Every rule of a configuration is broken once, and says so."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_samoe.config import PretrainConfig, derived
from megatron_samoe.config import validate as validation
from megatron_samoe.config.cli import from_mapping, read_yaml
from megatron_samoe.config.option import all_options
from megatron_samoe.config.rules import Row, Table, layout, model, moe, run
from megatron_samoe.config.validate import validate
from megatron_samoe.errors import ConfigError, ConfigErrors
from tests.harness.tiny import with_options

#: Modules of rules.
KINDS = (layout, model, moe, run)
SOURCES = "\n".join(path.read_text() for path in (Path(__file__).resolve().parents[3] / "megatron_samoe").rglob("*.py"))
EXAMPLES = Path(__file__).resolve().parents[3] / "examples/configs"
QUICKSTART = Path(__file__).resolve().parents[3] / "megatron_samoe/cli/quickstart_data/config.yaml"
VALID = with_options(PretrainConfig(), mock_data=True)
MOE = {"expert_layout": "moe"}
SAMOE = {"expert_layout": "samoe"}
PP2 = {"pipeline_model_parallel_size": 2}

#: options, world size, the flag that is named, a part of what is allowed
BROKEN: list[tuple[dict[str, Any], int, str, str]] = [
    ({"swiglu": True, "hidden_size": 16, "num_attention_heads": 4}, 1, "--hidden-size", "too small"),
    ({"rope_scaling_type": "linear"}, 1, "--rope-scaling-type", "needs --position-embedding-type rope"),
    ({"position_embedding_type": "rope", "rope_scaling_type": "yarn"}, 1, "--rope-original-max-positions", "must be given"),
    ({"position_embedding_type": "rope", "rope_scaling_type": "linear", "rope_scaling_factor": 0.5}, 1, "--rope-scaling-factor", "1 or"),
    ({"position_embedding_type": "rope", "rope_scaling_type": "llama3", "rope_low_freq_factor": 5.0}, 1, "--rope-low-freq-factor", "below"),
    ({"position_embedding_type": "rope", "yarn_beta_fast": 5.0}, 1, "--yarn-beta-fast", "needs --rope-scaling-type yarn"),
    ({"kv_lora_rank": 64}, 1, "--kv-lora-rank", "needs --multi-latent-attention"),
    ({"multi_latent_attention": True}, 1, "--multi-latent-attention", "needs --position-embedding-type rope"),
    ({"multi_latent_attention": True, "qk_layernorm": True}, 1, "--qk-layernorm", "has no use with --multi-latent-attention"),
    ({"multi_latent_attention": True, "qk_pos_emb_head_dim": 3}, 1, "--qk-pos-emb-head-dim", "even"),
    ({"multi_latent_attention": True, "v_head_dim": 193}, 1, "--v-head-dim", "at most"),
    ({"sliding_window": 0}, 1, "--sliding-window", "positive"),
    ({"sliding_window": 4, "window_attn_skip_freq": 1}, 1, "--window-attn-skip-freq", "from 2 to the 8 layers"),
    ({"window_attn_skip_freq": 2}, 1, "--window-attn-skip-freq", "needs --sliding-window"),
    ({"qk_layernorm": True, "qk_layernorm_scope": "all"}, 1, "--qk-layernorm-scope", "needs --normalization RMSNorm"),
    ({"attn_logit_softcapping": 0.0}, 1, "--attn-logit-softcapping", "above 0"),
    ({"clip_qkv": 0.0}, 1, "--clip-qkv", "above 0"),
    ({"multi_latent_attention": True, "clip_qkv": 1.0}, 1, "--clip-qkv", "has no use with --multi-latent-attention"),
    ({"exact_gelu": True, "swiglu": True}, 1, "--exact-gelu", "no use with --swiglu"),
    ({"attention_bias": True, "disable_bias_linear": True, "add_qkv_bias": True}, 1, "--add-qkv-bias", "no use with --attention-bias"),
    ({"moe_shared_expert_gate": True, **MOE}, 1, "--moe-shared-expert-gate", "needs --moe-shared-expert-intermediate-size"),
    ({"moe_shared_expert_gate": True, "moe_residual_mlp": True, "moe_shared_expert_intermediate_size": 8, **MOE}, 1,
     "--moe-shared-expert-gate", "no use with --moe-residual-mlp"),
    ({"cp_comm_type": "a2a"}, 1, "--cp-comm-type", "needs --context-parallel-size above 1"),
    ({"context_parallel_size": 3, "seq_length": 252}, 4, "--context-parallel-size", "or set it to one of [1, 2, 4]"),
    ({"context_parallel_size": 3}, 3, "--seq-length", "divisible by 2 x --context-parallel-size 3 = 6: 252 or 258"),
    ({"context_parallel_size": 2, "seq_length": 2}, 2, "--seq-length", "= 4: 4"),
    ({"context_parallel_size": 2, "attention_dropout": 0.1}, 2, "--attention-dropout", "must be 0"),
    ({"context_parallel_size": 2, "sliding_window": 8}, 2, "--sliding-window", "needs --cp-comm-type a2a"),
    ({"context_parallel_size": 2, "softmax_type": "learnable"}, 2, "--softmax-type", "needs --cp-comm-type a2a"),
    ({"context_parallel_size": 2, "attn_logit_softcapping": 8.0}, 2, "--attn-logit-softcapping", "needs --cp-comm-type a2a"),
    ({"context_parallel_size": 2, "reset_attention_mask": True}, 2, "--reset-attention-mask", "needs --cp-comm-type a2a"),
    ({"context_parallel_size": 4, "cp_comm_type": "a2a", "group_query_attention": True, "num_query_groups": 2}, 4, "--cp-comm-type",
     "may be one of [1, 2]"),
    ({"rotary_base": 5000.0}, 1, "--rotary-base", "needs --position-embedding-type rope"),
    ({"tokenizer_model": "x.model"}, 1, "--tokenizer-model", "has no use"),
    ({"keep_last": 2}, 1, "--keep-last", "needs --save"),
    ({"samoe_coefficient_lr_mult": 2.0}, 1, "--samoe-coefficient-lr-mult", "that are trained"),
    ({"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.1}, 1, "--moe-aux-loss-coeff", "no use"),
    ({"lr_decay_style": "constant", "min_lr": 1e-5}, 1, "--min-lr", "no use"),
    ({"num_layers": 0}, 1, "--num-layers", "positive"),
    ({"hidden_size": -8}, 1, "--hidden-size", "positive"),
    ({"num_threads": 0}, 1, "--num-threads", "positive"),
    ({"save_interval": 0, "save": "x"}, 1, "--save-interval", "positive"),
    ({"hidden_dropout": 1.0}, 1, "--hidden-dropout", "at least 0 and below 1"),
    ({"adam_beta2": float("nan")}, 1, "--adam-beta2", "at least 0 and below 1"),
    ({"moe_input_jitter_eps": -0.1, **MOE}, 1, "--moe-input-jitter-eps", "at least 0 and below 1"),
    ({"lr": float("inf")}, 1, "--lr", "finite number, 0 or more"),
    ({"train_iters": -1}, 1, "--train-iters", "0 or more"),
    ({"norm_epsilon": 0.0}, 1, "--norm-epsilon", "above 0"),
    ({"moe_expert_capacity_factor": 0.0, **MOE}, 1, "--moe-expert-capacity-factor", "above 0"),
    ({"num_attention_heads": 7}, 1, "--num-attention-heads", "--hidden-size 256"),
    ({"group_query_attention": True, "num_query_groups": 3}, 1, "--num-query-groups", "must divide"),
    ({"num_query_groups": 2}, 1, "--num-query-groups", "--group-query-attention"),
    ({"position_embedding_type": "rope", "kv_channels": 7}, 1, "--rotary-percent", "even"),
    ({"position_embedding_type": "rope", "rotary_percent": 1.5}, 1, "--rotary-percent", "32 head channels"),
    ({"max_position_embeddings": 8}, 1, "--max-position-embeddings", "--seq-length 256"),
    ({"moe_dispatch_chunks": 0, **MOE}, 2, "--moe-dispatch-chunks", "positive"),
    ({"moe_dispatch_chunks": 2, **MOE}, 2, "--moe-dispatch-chunks", "--expert-model-parallel-size above 1"),
    ({"moe_all_to_all_backend": "extension", **MOE}, 2, "--moe-all-to-all-backend", "--expert-model-parallel-size above 1"),
    ({"moe_hierarchical_all_to_all": True, "expert_model_parallel_size": 2, **MOE}, 2, "--moe-hierarchical-all-to-all",
     "needs --moe-all-to-all-backend extension"),
    ({"moe_dispatch_chunks": 5, "expert_model_parallel_size": 2, **MOE}, 2, "--moe-dispatch-chunks", "the 4 experts"),
    ({"moe_shared_expert_overlap": True, "expert_model_parallel_size": 2, **MOE}, 2, "--moe-shared-expert-overlap",
     "--moe-shared-expert-intermediate-size"),
    ({"moe_layer_freq": "012", **MOE}, 1, "--moe-layer-freq", "8 zeros and ones"),
    ({"moe_layer_freq": "[0,1]*3", **MOE}, 1, "--moe-layer-freq", "this one has 6 entries"),
    ({"moe_layer_freq": "00000000", **MOE}, 1, "--moe-layer-freq", "at least one layer"),
    ({"moe_router_topk": 9, **MOE}, 1, "--moe-router-topk", "--num-experts 8"),
    ({"moe_router_pre_softmax": False, "moe_router_topk": 1, **MOE}, 1, "--moe-router-pre-softmax", "always 1"),
    ({"num_expert_banks": 9, **SAMOE}, 1, "--num-expert-banks", "that combine them, 8"),
    ({"samoe_combine": "layer", **MOE}, 1, "--samoe-combine", "--expert-layout samoe, or --expert-sharing"),
    ({"samoe_freeze_coefficients": True}, 1, "--samoe-freeze-coefficients", "--expert-layout samoe, or --expert-sharing"),
    ({"moe_ffn_hidden_size": 64}, 1, "--moe-ffn-hidden-size", "--expert-layout moe or samoe"),
    ({"moe_token_drop_policy": "position", **MOE}, 1, "--moe-token-drop-policy", "--moe-expert-capacity-factor"),
    ({"add_qkv_bias": True}, 1, "--add-qkv-bias", "--disable-bias-linear"),
    ({"recompute_num_layers": 2}, 1, "--recompute-num-layers", "--recompute-granularity full"),
    ({"lr_wsd_decay_iters": 5}, 1, "--lr-wsd-decay-iters", "--lr-decay-style WSD"),
    ({"loss_scale": 128.0}, 1, "--loss-scale", "--fp16"),
    ({"pipeline_model_parallel_size": 4}, 6, "--pipeline-model-parallel-size", "[1, 2, 3, 6]"),
    ({"pipeline_model_parallel_size": 3}, 3, "--pipeline-model-parallel-size", "divide --num-layers 8"),
    ({"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}, 12, "--tensor-model-parallel-size",
     "over --pipeline-model-parallel-size 2"),
    ({"num_layers_per_virtual_pipeline_stage": 2}, 1, "--num-layers-per-virtual-pipeline-stage", "above 1"),
    ({"pipeline_model_parallel_layout": "Et*8L"}, 1, "--pipeline-model-parallel-layout", "above 1"),
    ({"pipeline_schedule": "gpipe"}, 1, "--pipeline-schedule", "above 1"),
    ({**PP2, "num_layers_per_virtual_pipeline_stage": 2, "pipeline_model_parallel_layout": "Et*4|t*4L"}, 2,
     "--num-layers-per-virtual-pipeline-stage", "excludes --pipeline-model-parallel-layout"),
    ({**PP2, "pipeline_model_parallel_layout": "t*4|t*4"}, 2, "--pipeline-model-parallel-layout", "E (embedding)"),
    ({**PP2, "pipeline_model_parallel_layout": "Et*4|t*3L"}, 2, "--pipeline-model-parallel-layout", "has 7 layers"),
    ({**PP2, "pipeline_model_parallel_layout": "Et*4|t*3|tL"}, 2, "--pipeline-model-parallel-layout", "has 3 stages"),
    ({**PP2, "num_layers_per_virtual_pipeline_stage": 3}, 2, "--num-layers-per-virtual-pipeline-stage",
     "one of [1, 2, 4]"),
    ({**PP2, "num_layers_per_virtual_pipeline_stage": 0}, 2, "--num-layers-per-virtual-pipeline-stage", "positive"),
    ({**PP2, "num_layers_per_virtual_pipeline_stage": 2, "pipeline_schedule": "gpipe", "global_batch_size": 8}, 2,
     "--pipeline-schedule", "use 1f1b"),
    ({**PP2, "num_layers_per_virtual_pipeline_stage": 2, "global_batch_size": 12}, 2, "--global-batch-size",
     "makes 3 micro-batches"),
    ({"sequence_parallel": True}, 1, "--sequence-parallel", "--tensor-model-parallel-size above 1"),
    ({"sequence_parallel": True, "tensor_model_parallel_size": 2, "micro_batch_size": 1, "seq_length": 15}, 2,
     "--micro-batch-size", "with --sequence-parallel"),
    ({"pool_replica_check_interval": 5, **SAMOE}, 1, "--pool-replica-check-interval", "replicated"),
    ({"tensor_model_parallel_size": 4}, 6, "--tensor-model-parallel-size", "[1, 2, 3, 6]"),
    ({"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 2, **MOE}, 4, "--expert-tensor-parallel-size",
     "1 or --tensor-model-parallel-size 4"),
    ({"expert_model_parallel_size": 4, **MOE}, 6, "--expert-model-parallel-size", "one of [1, 2, 3, 6]"),
    ({"num_attention_heads": 4, "tensor_model_parallel_size": 8}, 8, "--num-attention-heads", "divisible by"),
    ({"group_query_attention": True, "num_query_groups": 1, "tensor_model_parallel_size": 2}, 2, "--num-query-groups",
     "divisible by --tensor-model-parallel-size 2"),
    ({"make_vocab_size_divisible_by": 5, "tensor_model_parallel_size": 2}, 2, "--make-vocab-size-divisible-by",
     "divisible by"),
    ({"expert_model_parallel_size": 2}, 2, "--expert-model-parallel-size", "must be 1 with --expert-layout dense"),
    ({"num_experts": 6, "expert_model_parallel_size": 4, **MOE}, 4, "--num-experts", "divisible by"),
    ({"moe_ffn_hidden_size": 33, "tensor_model_parallel_size": 2, **MOE}, 2, "--moe-ffn-hidden-size", "divisible by"),
    ({"moe_shared_expert_intermediate_size": 33, "tensor_model_parallel_size": 2, **MOE}, 2,
     "--moe-shared-expert-intermediate-size", "divisible by"),
    ({"micro_batch_size": 1, "seq_length": 15, "tensor_model_parallel_size": 2,
      "expert_tensor_parallel_size": 1, **MOE}, 2, "--micro-batch-size", "15 tokens"),
    ({"global_batch_size": 12, "micro_batch_size": 4}, 2, "--global-batch-size", "= 8"),
    ({"min_lr": 1.0}, 1, "--min-lr", "--lr 0.001"),
    ({"lr_warmup_fraction": 1.5}, 1, "--lr-warmup-fraction", "from 0 to 1"),
    ({"lr_warmup_fraction": 0.5, "lr_warmup_iters": 3}, 1, "--lr-warmup-fraction", "excludes --lr-warmup-iters"),
    ({"lr_warmup_iters": 101}, 1, "--lr-warmup-iters", "100 decay steps"),
    ({"bf16": True, "fp16": True}, 1, "--fp16", "excludes --bf16"),
    ({"data_path": ("x",)}, 1, "--mock-data", "excludes --data-path"),
    ({"mock_data": False, "data_path": ("x",), "train_data_path": ("y",)}, 1, "--data-path", "excludes"),
    ({"mock_data": False}, 1, "--data-path", "must name a dataset"),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "v"}, 1, "--tokenizer-type", "--merge-file"),
    ({"tokenizer_type": "HuggingFaceTokenizer"}, 1, "--tokenizer-type", "--tokenizer-model"),
    ({"save_interval": 5}, 1, "--save-interval", "--save or --run-dir"),
    ({"finetune": True}, 1, "--finetune", "--load or --run-dir"),
    ({"finetune": True, "load": "x", "pretrained_checkpoint": "y"}, 1, "--finetune", "excludes --pretrained-checkpoint"),
    ({"save": "x", "pretrained_checkpoint": "y"}, 1, "--pretrained-checkpoint", "needs --load (or --run-dir) beside --save"),
    ({"test_data_path": ("t",), "eval_iters": 0}, 1, "--test-data-path", "needs --eval-iters above 0"),
    ({"full_validation": True, "eval_iters": 0}, 1, "--full-validation", "needs --eval-iters above 0"),
    ({"moe_aux_loss_group_size": 0, "moe_router_load_balancing_type": "aux_loss", **MOE}, 1, "--moe-aux-loss-group-size",
     "positive"),
    ({"moe_aux_loss_group_size": 3, "moe_router_load_balancing_type": "aux_loss", **MOE}, 2, "--moe-aux-loss-group-size",
     "micro-batch-size 4 x data-parallel size 2: one of [1, 2, 4, 8]"),
    ({"exp_name": "a"}, 1, "--exp-name", "needs --wandb-project or --trackio-project"),
    ({"profile_step_end": 20}, 1, "--profile-step-end", "needs --profile"),
    ({"profile": True, "run_dir": "r", "profile_step_start": 12}, 1, "--profile-step-end", "above --profile-step-start 12"),
    ({"profile": True, "run_dir": "r", "profile_ranks": (0, 4)}, 4, "--profile-ranks", "ranks from 0 to 3"),
    ({"profile": True}, 1, "--profile", "needs --run-dir or --save"),
    ({"teacher": "x", "teacher_until": 101}, 1, "--teacher-until", "at most --train-iters 100"),
    ({"teacher": "x", "teacher_until": 0}, 1, "--teacher-until", "positive"),
    ({"teacher": "x", "teacher_temperature": 0.0}, 1, "--teacher-temperature", "above 0"),
    ({"teacher": "x", "teacher_weight": -1.0}, 1, "--teacher-weight", "above 0"),
    ({"teacher_until": 5}, 1, "--teacher-until", "needs --teacher"),
    ({"teacher_temperature": 2.0}, 1, "--teacher-temperature", "needs --teacher"),
    ({"teacher_weight": 2.0}, 1, "--teacher-weight", "needs --teacher"),
    ({"spike_window": 2}, 1, "--spike-window", "3 or more steps"),
    ({"skip_spikes": True}, 1, "--skip-spikes", "needs --spike-window"),
    ({"spike_window": -1}, 1, "--spike-window", "0 or more"),
    ({"elastic": True}, 1, "--elastic", "needs --global-batch-size"),
    ({"num_layers": 10**9}, 1, "--num-layers", "at most 100,000"),
    ({"hidden_size": 10**18}, 1, "--hidden-size", "at most 2,147,483,647"),
    ({"num_layers": 10**5, "num_experts": 10**6, **MOE}, 1, "--num-experts", "times --num-layers must be at most"),
    ({"seed": 2**32}, 1, "--seed", "at most 4,294,967,295"),
    ({"moe_aux_loss_group_size": 2, **MOE}, 1, "--moe-aux-loss-group-size", "needs --moe-router-load-balancing-type aux_loss"),
    ({"moe_router_topk": 3, **MOE}, 1, "--moe-ffn-hidden-size", "--moe-router-topk 3 does not divide"),
    ({"moe_router_lr_mult": 0.0, **MOE}, 1, "--moe-router-lr-mult", "above 0"),
    ({"moe_router_lr_mult": 0.7}, 1, "--moe-router-lr-mult", "--expert-layout moe or samoe"),
    ({"moe_expert_lr_mult": 0.0, **MOE}, 1, "--moe-expert-lr-mult", "above 0"),
    ({"moe_expert_lr_mult": 0.5}, 1, "--moe-expert-lr-mult", "--expert-layout moe or samoe"),
    ({"moe_output_lr_mult": -1.0, **MOE}, 1, "--moe-output-lr-mult", "above 0"),
    ({"moe_output_lr_mult": 2.0}, 1, "--moe-output-lr-mult", "--expert-layout moe or samoe"),
    ({"samoe_bank_lr_mult": float("nan"), **SAMOE}, 1, "--samoe-bank-lr-mult", "above 0"),
    ({"samoe_bank_lr_mult": 2.0, **MOE}, 1, "--samoe-bank-lr-mult", "--expert-layout samoe, or --expert-sharing"),
    ({"samoe_coefficient_lr_mult": 0.0, **SAMOE}, 1, "--samoe-coefficient-lr-mult", "above 0"),
    ({"rampup_batch_size": (4, 4, 100)}, 1, "--rampup-batch-size", "needs --train-samples"),
    ({"lr_warmup_samples": 4}, 1, "--lr-warmup-samples", "needs --train-samples"),
    ({"train_samples": 100, "rampup_batch_size": (5, 2, 100), "global_batch_size": 8}, 1, "--rampup-batch-size", "divides"),
    ({"train_samples": 100, "rampup_batch_size": (4, 0, 100), "global_batch_size": 8}, 1, "--rampup-batch-size", "positive"),
    ({"train_samples": 100, "rampup_batch_size": (4, 2, 100), "global_batch_size": 8}, 1, "--rampup-batch-size", "each batch size"),
    ({"train_samples": 100, "rampup_batch_size": (2, 2, 100), "global_batch_size": 4, "micro_batch_size": 2, "num_layers": 8,
      "num_layers_per_virtual_pipeline_stage": 2, **PP2}, 2, "--rampup-batch-size", "makes 1 micro-batches"),
    ({"train_samples": 100, "train_iters": 7, "global_batch_size": 8}, 1, "--train-iters", "makes 12 steps"),
    ({"train_samples": 3, "global_batch_size": 8}, 1, "--train-samples", "at least one batch, 8"),
    ({"train_samples": 40, "rampup_batch_size": (4, 4, 2000), "global_batch_size": 8}, 1, "--rampup-batch-size",
     "and --train-samples is 40"),
    ({"train_samples": 100, "lr_wsd_decay_samples": 10}, 1, "--lr-wsd-decay-samples", "needs --lr-decay-style WSD"),
    ({"position_embedding_type": "rope", "rope_scaling_type": "yarn", "rope_scaling_factor": 2.0, "rotary_base": 1.0,
      "rope_original_max_positions": 64}, 1, "--rotary-base", "above 1"),
    ({"train_samples": 100, "lr_warmup_iters": 7}, 1, "--lr-warmup-iters", "give --lr-warmup-samples"),
    ({"train_samples": 100, "lr_warmup_samples": 101}, 1, "--lr-warmup-samples", "at most the 100 decay samples"),
    ({"lr_mult_patterns": ("router",)}, 1, "--lr-mult-patterns", "each be PATTERN=FACTOR"),
    ({"lr_mult_patterns": ("router=-1",)}, 1, "--lr-mult-patterns", "each be PATTERN=FACTOR"),
    ({"lr_mult_patterns": ("(=1",)}, 1, "--lr-mult-patterns", "each be PATTERN=FACTOR"),
    ({"weight_decay_mult_patterns": ("fc1=inf",)}, 1, "--weight-decay-mult-patterns", "each be PATTERN=FACTOR"),
    ({"moe_router_init_method_std": float("inf"), **MOE}, 1, "--moe-router-init-method-std", "above 0"),
    ({"moe_scale_output_init": False}, 1, "--moe-scale-output-init", "--expert-layout moe or samoe"),
    ({"num_experts": (4, 8), **MOE}, 1, "--num-experts", "one for each of the 8 MoE layers"),
    ({"num_experts": (), **MOE}, 1, "--num-experts", "one for each of the 8 MoE layers"),
    ({"num_experts": (4, 0) * 4, **MOE}, 1, "--num-experts", "positive"),
    ({**MOE, "moe_router_num_groups": 3}, 1, "--moe-router-num-groups", "must divide --num-experts: one of [1, 2, 4, 8]"),
    ({**MOE, "moe_router_num_groups": 4}, 1, "--moe-router-group-topk", "must be given with --moe-router-num-groups"),
    ({**MOE, "moe_router_num_groups": 2, "moe_router_topk": 6, "moe_router_group_topk": 4}, 1, "--moe-router-group-topk",
     "be at most --moe-router-num-groups 2: one of [1, 2]"),
    ({**MOE, "moe_router_num_groups": 4, "moe_router_topk": 4, "moe_router_group_topk": 1}, 1, "--moe-router-group-topk",
     "leaves a token 1 groups of 2 experts, fewer than --moe-router-topk 4"),
    ({**MOE, "moe_router_group_topk": 2}, 1, "--moe-router-group-topk", "needs --moe-router-num-groups"),
    ({**MOE, "moe_router_bias_update_rate": 0.1}, 1, "--moe-router-bias-update-rate", "needs --moe-router-enable-expert-bias"),
    ({**MOE, "moe_router_score_function": "norm", "moe_router_pre_softmax": True}, 1, "--moe-router-pre-softmax", "no use"),
    ({**MOE, "moe_balance_scope": "set"}, 1, "--moe-balance-scope", "needs --expert-sharing tied, scaled or pool, not own"),
    ({**MOE, "expert_sharing": "pool", "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_group_size": 2}, 1,
     "--moe-aux-loss-group-size", "must be 1 with --moe-balance-scope set"),
    ({**MOE, "expert_sharing": "tide"}, 1, "--expert-sharing", "must be one of own, combined, tied, scaled, pool, neighbours, or an"),
    ({**MOE, "expert_sharing": "0,1,x"}, 1, "--expert-sharing", "such as 0,1,1,1,2"),
    ({**MOE, "expert_sharing": "pool:0,1"}, 1, "--expert-sharing", "must be one of"),
    ({**MOE, "expert_sharing": "0*999999999"}, 1, "--expert-sharing", "must be one of"),
    ({**MOE, "expert_sharing": "0,1,1"}, 1, "--expert-sharing", "the nearest legal map is 0,1*7"),
    ({**MOE, "expert_sharing": "0*9"}, 1, "--expert-sharing", "has 9 entries and must have one for each of 8 MoE layers; "
     "the nearest legal map is 0*8"),
    ({**MOE, "expert_sharing": "0,0,2,2,2,2,5,5"}, 1, "--expert-sharing", "without a gap; the nearest legal map is 0*2,1*4,2*2"),
    ({**MOE, "expert_sharing": "scaled:1*8"}, 1, "--expert-sharing", "the nearest legal map is scaled:0*8"),
    ({**MOE, "expert_sharing": "tied", "num_expert_sets": 9}, 1, "--num-expert-sets", "at most the 8 MoE layers"),
    ({**MOE, "expert_sharing": "pool", "num_expert_sets": 2}, 1, "--num-expert-sets", "needs --expert-sharing tied or"),
    ({**MOE, "expert_sharing": "tied", "untied_ends": 4}, 1, "--untied-ends", "at least 2 of 8 MoE layers that share, so at most 3"),
    ({**MOE, "expert_sharing": "0*8", "untied_ends": 1}, 1, "--untied-ends", "a map says itself"),
    ({**MOE, "untied_ends": 1}, 1, "--untied-ends", "needs --expert-layout samoe, or --expert-sharing other than own"),
    ({"expert_sharing": "tied"}, 1, "--expert-sharing", "needs --expert-layout moe, not dense"),
    ({**SAMOE, "expert_sharing": "tied"}, 1, "--expert-sharing", "needs --expert-layout moe, not samoe"),
    ({**MOE, "expert_sharing": "tied", "num_experts": (4, 8) * 4}, 1, "--num-experts", "one number for all layers that use set 0"),
    ({**MOE, "expert_sharing": "pool", "moe_router_topk": 9}, 1, "--moe-router-topk", "at most --num-experts 8"),
    ({**SAMOE, "untied_ends": 3, "num_expert_banks": 4}, 1, "--num-expert-banks", "that combine them, 2: more banks"),
    ({"num_experts": (4, 8) * 4, **SAMOE}, 1, "--num-experts", "all layers that combine the same banks"),
    ({"num_experts": (4, 6) * 4, "expert_model_parallel_size": 4, **MOE}, 4, "--num-experts", "one of [1, 2]"),
    ({**MOE, "moe_router_relu_update_rate": 0.1}, 1, "--moe-router-relu-update-rate", "needs --moe-router-score-function relu"),
    ({**MOE, "moe_router_score_function": "relu", "moe_router_load_balancing_type": "none"}, 1,
     "--moe-router-load-balancing-type", "the loss alone keeps the number of experts small"),
    ({**MOE, "moe_router_score_function": "relu", "moe_router_enable_expert_bias": True}, 1, "--moe-router-enable-expert-bias",
     "no use with --moe-router-score-function relu"),
    ({**MOE, "moe_router_expert_choice": True}, 1, "--moe-router-expert-choice", "needs --moe-router-load-balancing-type none"),
    ({**MOE, "num_neighbour_layers": 4}, 1, "--num-neighbour-layers", "needs --expert-sharing neighbours"),
    ({**MOE, "expert_sharing": "neighbours", "num_neighbour_layers": 9}, 1, "--num-neighbour-layers", "from 2 to the 8 MoE layers"),
    ({**MOE, "expert_sharing": "neighbours", "num_experts": (4, 8) * 4}, 1, "--num-experts", "one number with --expert-sharing n"),
    ({**MOE, "pool_lock_step": 4}, 1, "--pool-lock-step", "needs --expert-sharing pool"),
    ({**MOE, "pool_lock_anneal_steps": 4}, 1, "--pool-lock-anneal-steps", "needs --pool-lock-step"),
    ({**MOE, "expert_sharing": "pool", "num_experts": 20, "pool_lock_step": 4}, 1, "--num-experts",
     "multiple of the 8 MoE layers with --pool-lock-step, with at least --moe-router-topk 2 for each, such as 16"),
    ({**MOE, "expert_sharing": "pool", "num_experts": 16, "pool_lock_step": 10**6}, 1, "--pool-lock-step", "after --train-iters"),
    ({**MOE, "expert_sharing": "pool", "num_experts": (20,) * 8, "pool_lock_step": 4}, 1, "--num-experts", "such as 16"),
    ({**MOE, "expert_sharing": "pool", "num_experts": 16, "pool_lock_step": 4, "moe_expert_capacity_factor": 1.0}, 1,
     "--pool-lock-step", "cannot be used with"),
    ({**MOE, "expert_sharing": "pool", "num_experts": 16, "pool_lock_step": 4, "moe_router_num_groups": 4,
      "moe_router_group_topk": 1}, 1, "--moe-router-num-groups", "cannot be used with --pool-lock-step"),
    ({**MOE, "expert_sharing": "neighbours", "neighbour_unmask_steps": 10**6}, 1, "--neighbour-unmask-steps", "at most --train-iters"),
    ({**MOE, "expert_sharing": "neighbours", "neighbour_unmask_steps": 4, "moe_router_expert_choice": True,
      "moe_router_load_balancing_type": "none"}, 1, "--neighbour-unmask-steps", "count on all experts"),
    ({**MOE, "moe_router_score_function": "relu", "moe_aux_loss_coeff": 0.0}, 1, "--moe-aux-loss-coeff", "above 0 with"),
    ({"use_checkpoint_args": True}, 1, "--use-checkpoint-args", "--run-dir or --pretrained-checkpoint"),
    ({"ckpt_step": 3}, 1, "--ckpt-step", "--load or --run-dir"),
    ({"skip_train": True}, 1, "--skip-train", "needs --load"),
]  # fmt: skip


def errors_of(options: dict[str, Any], world_size: int) -> list[ConfigError]:
    try:
        validate(with_options(VALID, **options), world_size)
    except ConfigErrors as error:
        return error.errors
    return []


@pytest.mark.parametrize(("options", "world_size", "flag", "allowed"), BROKEN)
def test_broken_rule_names_flag_value_and_what_is_allowed(
    options: dict[str, Any], world_size: int, flag: str, allowed: str
) -> None:
    found = [error for error in errors_of(options, world_size) if error.field == flag]
    assert found, f"nothing is said about {flag}"
    assert any(allowed in error.allowed for error in found), [str(error) for error in found]
    field = flag[2:].replace("-", "_")
    if field in options:
        assert f"{flag} = {options[field]!r}: " in str(found[0])


def test_every_row_of_every_table_holds_in_a_case_above(monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[tuple[str, int]] = set()

    def noted(table: Table, config: PretrainConfig, world_size: int) -> Iterator[Row]:
        rows: Any = table.rows(config, world_size)
        for row in rows:
            inner = rows
            while inner.gi_yieldfrom is not None:
                inner = inner.gi_yieldfrom
            if row[1]:
                held.add((inner.gi_frame.f_code.co_filename, inner.gi_frame.f_lineno))
            yield row

    tables = [table._replace(rows=partial(noted, table)) for table in validation.TABLES]
    monkeypatch.setattr(validation, "TABLES", tables)
    for options, world_size, _, _ in BROKEN:
        errors_of(options, world_size)
    rows = [
        (inspect.getfile(module), node)
        for module in KINDS
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Yield)
    ]
    assert len(rows) > 60
    silent = [
        f"{file}:{row.lineno}"
        for file, row in rows
        if not any((file, line) in held for line in range(row.lineno, (row.end_lineno or 0) + 1))
    ]
    assert not silent, f"no case reaches the rows at {silent}"


def test_what_only_cuda_does_is_advised_for_cuda() -> None:
    """Else a rule sends a user of a CPU to an option that is refused there. Which these are their refusals say."""
    bound = set(re.findall(r'ConfigError\(\s*"(--[\w-]+)", True, f?"needs (?:a )?CUDA', SOURCES))
    assert bound == {"--fp16", "--moe-hierarchical-all-to-all"}
    told = [error for options, world_size, _, _ in BROKEN for error in errors_of(options, world_size)]
    about = [e for e in told if e.field in bound or any(f"needs {flag}" in e.allowed for flag in bound)]
    silent = [str(error) for error in about if "CUDA" not in error.allowed and "excludes" not in error.allowed]
    assert about and not silent


DEFAULTS = {name: default for _, name, _, default, _ in all_options(PretrainConfig())}


def test_no_rule_advises_what_another_refuses() -> None:
    """An option is given what its refusal says that it needs, and is not sent elsewhere then."""
    followed = 0
    for options, world_size, flag, _ in BROKEN:
        for error in errors_of(options, world_size):
            advice = re.match(r"needs (--[\w-]+)(?: ([\w]+))?(?:[,;]| or | with |$)", error.allowed)
            name = "" if advice is None else advice[1][2:].replace("-", "_")
            if error.field != flag or advice is None or not (advice[2] or DEFAULTS[name] is False):
                continue
            again = errors_of({**options, name: advice[2] or True}, world_size)
            assert not [
                str(e)
                for e in again
                if e.allowed == error.allowed or (e.field == advice[1] and "excludes" in e.allowed)
            ]
            followed += 1
    assert followed > 20, followed


@pytest.mark.parametrize(
    ("options", "world_size"),
    [
        ({}, 1),
        ({}, 7),
        ({"tensor_model_parallel_size": 4}, 8),
        ({"expert_model_parallel_size": 8, **MOE}, 8),
        (
            {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 8, **MOE},
            8,
        ),
        ({"num_expert_banks": 8, **SAMOE}, 1),
        ({"num_expert_banks": 64, "samoe_granularity": "expert", **SAMOE}, 1),
        ({"train_iters": 0, "eval_iters": 0}, 1),
        (
            {
                "context_parallel_size": 2,
                "tensor_model_parallel_size": 2,
                "expert_model_parallel_size": 4,
                "num_experts": 8,
                **MOE,
            },
            8,
        ),
        ({"context_parallel_size": 8, "cp_comm_type": "a2a", "sliding_window": 9, "reset_attention_mask": True}, 8),
        ({"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True}, 16),
        ({**PP2, "num_layers_per_virtual_pipeline_stage": 2, "global_batch_size": 8}, 2),
        ({**PP2, "pipeline_model_parallel_layout": "Et*8|||L", "global_batch_size": 16}, 2),
        ({"pool_replica_check_interval": 5, "samoe_pool_placement": "replicated", **SAMOE}, 2),
        ({"lr_warmup_fraction": 1.0}, 1),
    ],
)
def test_legal_configurations_pass(options: dict[str, Any], world_size: int) -> None:
    assert errors_of(options, world_size) == []


@pytest.mark.parametrize(("path", "world_size"), [(QUICKSTART, 1), (EXAMPLES / "samoe_tiny.yaml", 2)])
def test_small_examples_can_be_shortened(path: Path, world_size: int) -> None:
    config = from_mapping(read_yaml(path), str(path))
    validate(with_options(config, train_iters=5, data_path=("x",), tokenizer_model="x.model"), world_size)


def test_all_broken_rules_are_reported_together() -> None:
    with pytest.raises(ConfigErrors) as raised:
        validate(with_options(VALID, bf16=True, fp16=True, lr=-1.0, num_layers=0), 1)
    fields = [error.field for error in raised.value.errors]
    assert {"--fp16", "--lr", "--num-layers"} <= set(fields)
    assert len(str(raised.value).splitlines()) == 1 + len(fields)
    assert raised.value.exit_status == 2


def test_a_text_that_several_tables_read_is_refused_once_and_numbers_out_of_range_ask_no_more() -> None:
    assert [error.field for error in errors_of({"moe_layer_freq": "012", **MOE}, 1)] == ["--moe-layer-freq"]
    problems = errors_of({"tensor_model_parallel_size": 0, "context_parallel_size": 3, "fp16": True, "bf16": True}, 2)
    assert [error.field for error in problems] == ["--tensor-model-parallel-size", "--fp16"]


@pytest.mark.parametrize(
    ("text", "num_layers", "expected"),
    [
        ("1", 3, "111"), ("2", 5, "10101"), ("4", 4, "1000"), ("0101", 4, "0101"), ("[0,1]*2", 4, "0101"),
        ("([0, 1, 1])*2", 6, "011011"), ("[1]", 1, "1"),
        ("([0]*3+[1]*2)", 5, "00011"), ("[0]+[1]*2", 3, "011"), ("10", 10, "1000000000"), ("10", 2, "10"),
    ],
)  # fmt: skip
def test_moe_layer_freq(text: str, num_layers: int, expected: str) -> None:
    assert "".join(str(int(b)) for b in derived.parse_moe_layer_freq(text, num_layers)) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "5", "abc", "[0,2]*2", "01012", "[0,1]*0", "1.0", "([0]+[1])*2", "[0]*2+", "([0]*2+[1]"]
)
def test_wrong_moe_layer_freq_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--moe-layer-freq"):
        derived.parse_moe_layer_freq(text, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("EttL", (2,)), ("Et*3|t*4|t*4|t*3L", (3, 4, 4, 3)), ("Et, (tt|)*2 tL", (3, 2, 1)), ("E||tL", (0, 0, 1)),
        ("E(t*2|)*3L", (2, 2, 2, 0)), ("EL", (0,)),
    ],
)  # fmt: skip
def test_stage_layout(text: str, expected: tuple[int, ...]) -> None:
    assert derived.parse_stage_layout(text) == expected


@pytest.mark.parametrize(
    "text", ["", "tt", "Ett", "ttL", "EtEL", "EtLt", "Et*|L", "Et-L", "E(t|L", "Et*12345L", "E((t)*9999)*9999L"]
)
def test_wrong_stage_layout_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--pipeline-model-parallel-layout"):
        derived.parse_stage_layout(text)


def test_batch_and_data_parallel_sizes() -> None:
    config = with_options(VALID, tensor_model_parallel_size=2, micro_batch_size=3)
    assert derived.data_parallel_size(config, 8) == 4
    assert derived.global_batch_size(config, 8) == 12
    assert derived.global_batch_size(with_options(config, global_batch_size=24), 8) == 24
