"""What a native model is made of, as far as its configuration tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor
from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.models.rank_model import RankModel, compute_dtype
from megatron_samoe.parallel_state.state import single_process_state


@dataclass(frozen=True)
class NativeModel:
    """A configuration and its vocabulary, before padding.

    Attributes:
        vocab_size: tokens that exist.
    """

    config: PretrainConfig
    vocab_size: int

    @property
    def model(self) -> ModelConfig:
        """The transformer's options."""
        return self.config.model

    @property
    def moe(self) -> MoEConfig:
        """The experts' options."""
        return self.config.moe

    @cached_property
    def is_moe(self) -> tuple[bool, ...]:
        """For each layer whether it has experts."""
        return tuple(place.moe_index is not None for place in all_layers(self.config))

    @property
    def expert_size(self) -> int:
        """F of one expert."""
        return self.config.expert_ffn_size

    @property
    def has_bias(self) -> bool:
        """Whether linear layers (besides the query-key-value projection) and experts have biases."""
        return not self.model.disable_bias_linear

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All parameters by global name, from the model itself, built without storage."""
        # Layouts do not change the names and shapes of a checkpoint, so one process without a layout tells them.
        config = replace(self.config, parallel=ParallelConfig())
        model = RankModel(config, self.vocab_size, single_process_state("meta"), compute_dtype(config))
        return {name: StoredTensor(tuple(p.shape), p.dtype) for name, p in model.global_parameters().items()}
