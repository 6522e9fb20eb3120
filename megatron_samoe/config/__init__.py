"""Configuration: frozen dataclasses, their rules, and the command line that fills them."""

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import DistillationConfig, LoggingConfig, OptimizerConfig, TrainingConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistillationConfig",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PretrainConfig",
    "TrainingConfig",
]
