"""Options of the models that benchmarks train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_samoe.config import ModelConfig, MoEConfig, PretrainConfig, TrainingConfig


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
        heads, batch = self.hidden_size // 64, self.micro_batch_size * num_micro_batches * dp
        model = ModelConfig(self.num_layers, self.hidden_size, num_attention_heads=heads, seq_length=self.seq_length)
        training = TrainingConfig(micro_batch_size=self.micro_batch_size, global_batch_size=batch)
        return PretrainConfig(model=model, moe=MoEConfig(**given), training=training)
