"""The tensors of a native model, by its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from torch import nn

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import ExpertSource
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor, name_of
from megatron_samoe.errors import CheckpointError
from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.models.rank_model import RankModel, compute_dtype
from megatron_samoe.parallel_state.state import single_process_state

#: What a run can compute in.
_PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


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

    @cached_property
    def sources(self) -> tuple[ExpertSource, ...]:
        """Where each MoE layer's experts come from."""
        return tuple(place.source for place in all_layers(self.config) if place.source is not None)

    @property
    def expert_size(self) -> int:
        """F of one expert."""
        return self.config.expert_ffn_size

    @property
    def has_bias(self) -> bool:
        """Whether linear layers (besides the query-key-value projection) and experts have biases."""
        return not self.model.disable_bias_linear

    @cached_property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """All parameters by global name, from the model itself, built without storage."""
        # Layouts do not change the names and shapes of a checkpoint, so one process without a layout gives them.
        config = replace(self.config, parallel=ParallelConfig())
        model = RankModel(config, self.vocab_size, single_process_state("meta"), compute_dtype(config))
        return model.global_parameters()

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Shapes and dtypes of all parameters."""
        return {name: StoredTensor(tuple(p.shape), p.dtype) for name, p in self.parameters.items()}


def lossless_precision(
    native: NativeModel, stored: Iterable[tuple[str, str, torch.dtype]], where: str
) -> tuple[PretrainConfig, list[str]]:
    """Returns the configuration with the least precision in which none of the stored weights is rounded.

    Args:
        stored: native name, name in the files, and dtype of each tensor.
        where: the files, for messages.

    Returns:
        The configuration, and a line that says so where tensors of a wider dtype decided.

    Raises:
        CheckpointError: a tensor has a dtype in which no model computes.
    """
    half = replace(native, config=_in_precision(native.config, torch.bfloat16))
    # Routers and a pool are fp32 whatever the precision, and decide nothing.
    free = {name for name, tensor in half.tensors.items() if tensor.dtype == torch.bfloat16}
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, foreign, dtype in stored:
        if dtype not in _PRECISIONS:
            raise CheckpointError(f"{where}: {foreign} has dtype {name_of(dtype)}; save it as fp32, bf16 or fp16.")
        if name in free:
            by_dtype.setdefault(dtype, []).append(foreign)
    dtype = reduce(torch.promote_types, by_dtype)
    notes = []
    if len(by_dtype) > 1:
        counts = ", ".join(f"{len(names)} of {name_of(kind)} ({names[0]}, ...)" for kind, names in by_dtype.items())
        notes.append(
            f"Its weights have several precisions: {counts}. They become {name_of(dtype)}, which rounds none; "
            "--dtype bf16 would round the wider ones."
        )
    return _in_precision(native.config, dtype), notes


def _in_precision(config: PretrainConfig, dtype: torch.dtype) -> PretrainConfig:
    training = replace(config.training, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
    return replace(config, training=training)
