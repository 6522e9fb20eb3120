"""Models that benchmarks train: their options, and checkpoints that are made as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_samoe.config import ModelConfig, MoEConfig, PretrainConfig, TrainingConfig
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Flags for a model's size."""

    num_layers: int = 8
    hidden_size: int = 256
    num_experts: int = 8
    seq_length: int = 128
    micro_batch_size: int = 4

    def config(self, layout: Any, num_micro_batches: int, dp: int = 1, **moe: Any) -> PretrainConfig:
        """Returns a model to train; a SaMoE has a bank for four layers by default. None stands for a default."""
        given: dict[str, Any] = {}
        if layout != "dense":
            given = {"expert_layout": layout, "num_experts": self.num_experts, "moe_router_topk": 1}
            given |= {"num_expert_banks": max(1, self.num_layers // 4)} if layout == "samoe" else {}
            given |= {name: value for name, value in moe.items() if value is not None}
        return PretrainConfig(
            model=ModelConfig(
                num_layers=self.num_layers,
                hidden_size=self.hidden_size,
                num_attention_heads=self.hidden_size // 64,
                seq_length=self.seq_length,
            ),
            moe=MoEConfig(**given),
            training=TrainingConfig(
                micro_batch_size=self.micro_batch_size,
                global_batch_size=self.micro_batch_size * num_micro_batches * dp,
            ),
        )


@dataclass(frozen=True)
class MadeModel:
    """A model whose tensors are made when they are read, as the source of a checkpoint."""

    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    train_state: Mapping[str, Any]
    make: Callable[[str], torch.Tensor]
    attachments: Mapping[str, bytes] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor."""
        return self.make(name)
