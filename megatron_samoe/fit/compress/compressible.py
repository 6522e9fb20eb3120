"""Which models can be compressed, and what their experts take."""

from __future__ import annotations

from megatron_samoe.config.derived import experts_per_layer, num_moe_layers
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.convert.edited_model import compute_dtype, model_names, source_config
from megatron_samoe.convert.layer_experts import is_experts
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.errors import ConfigError


def require_compressible(source: GlobalTensors) -> PretrainConfig:
    """Returns the configuration of a MoE whose layers own equal numbers of experts; ConfigError for any other model."""
    config = source_config(source)
    moe = config.moe
    if moe.expert_layout == "dense":
        raise ConfigError("--load-dir", "a dense model", "must be a MoE: a dense model has no experts to share")
    if moe.shares_experts:
        raise ConfigError(
            "--load-dir",
            f"a model whose layers share experts ({moe.sharing})",
            "must be a MoE whose layers own their experts; megatron-samoe edit fold makes one",
        )
    counts = experts_per_layer(moe, num_moe_layers(config))
    if len(set(counts)) != 1:
        raise ConfigError(
            "--load-dir",
            f"a MoE of {', '.join(map(str, counts))} experts by layer",
            "must have the same number in each",
        )
    if len(counts) < 2:
        raise ConfigError("--load-dir", "a MoE of one MoE layer", "must have two MoE layers or more, which can share")
    return config


def expert_bytes(source: GlobalTensors) -> int:
    """Returns the bytes of all experts in the precision that the model computes in, with what says how layers use them."""
    width = compute_dtype(source).itemsize
    return sum(width * source.tensors[name].num_elements for name in model_names(source) if is_experts(name))
