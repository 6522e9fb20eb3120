"""The blueprint that a model is built from: its configuration, its parallel state, and its replaceable parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.models.latent_attention import configured_attention
from megatron_samoe.models.layer_layout import LayerSpec, all_layers, moe_layers_of
from megatron_samoe.models.mlp import activation_of
from megatron_samoe.moe.balance import AuxiliaryLosses, BalanceStrategy
from megatron_samoe.moe.branch_scale import branch_scale
from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.set_loads import SetLoads
from megatron_samoe.moe.sharing.mapped import MappedSharing
from megatron_samoe.moe.sharing.way import SharingContext, SharingWay
from megatron_samoe.moe.types import StatisticsLayout
from megatron_samoe.parallel_state.state import Group, ParallelState


@dataclass(frozen=True)
class ModelParts:
    """Parts of a model that code outside the package can replace, as docs/extending.md shows.

    Attributes:
        attention: makes a layer's attention, as `SelfAttention` is made and called.
        router: class of routers.
        balance: makes a layer's strategy from the configuration and the data-parallel group.
        sharing: makes the way of sharing experts between MoE layers.
    """

    attention: Callable[..., nn.Module] = configured_attention
    router: type[Router] = Router
    balance: Callable[[MoEConfig, Group], BalanceStrategy] = AuxiliaryLosses
    sharing: Callable[[SharingContext], SharingWay] = MappedSharing

    def __post_init__(self) -> None:
        if not (isinstance(self.router, type) and issubclass(self.router, Router)):
            raise TypeError(f"router is {self.router!r}; it must be a class derived from Router")
        for f in fields(self):
            if not callable(getattr(self, f.name)):
                raise TypeError(f"{f.name} is {getattr(self, f.name)!r}; it must be a class or a function")
        for kind, name in self.replaced().items():
            if "<lambda>" in name:
                raise TypeError(
                    f"{kind} is a lambda, {name}; give it a name by which checkpoints can distinguish it from others"
                )

    def replaced(self) -> Mapping[str, str]:
        """Returns the names of parts that are not the package's own, by kind; checkpoints record them."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _name_of(part) for name, part in parts.items() if part is not getattr(ModelParts, name)}


def _name_of(part: Any) -> str:
    if isinstance(part, partial):
        given = [*map(repr, part.args), *(f"{name}={value!r}" for name, value in part.keywords.items())]
        return f"{_name_of(part.func)}({', '.join(given)})"
    return f"{getattr(part, '__module__', '')}.{getattr(part, '__qualname__', type(part).__qualname__)}"


@dataclass(frozen=True)
class Blueprint:
    """Everything that the constructors of a model's modules need.

    Attributes:
        vocab_size: number of tokens, before padding.
        dtype: of weights and activations.
    """

    config: PretrainConfig
    vocab_size: int
    state: ParallelState
    dtype: torch.dtype
    parts: ModelParts = field(default_factory=ModelParts)

    @cached_property
    def expert_shapes(self) -> tuple[ExpertShape, ...]:
        """Shapes of the experts of all MoE layers of the model."""
        return tuple(expert_shape(self.config, spec) for spec in all_layers(self.config) if spec.num_experts)

    @cached_property
    def sharing_context(self) -> SharingContext:
        """The context that ways of sharing are made from."""
        pp = self.config.parallel.pipeline_model_parallel_size
        layers_of_stage = tuple(moe_layers_of(self.config, stage) for stage in range(pp))
        sources = tuple(spec.source for spec in all_layers(self.config) if spec.source is not None)
        return SharingContext(self.config.moe, sources, self.expert_shapes, layers_of_stage, self.state, self.dtype)

    @cached_property
    def sharing(self) -> SharingWay:
        """The way in which the MoE layers share experts."""
        return self.parts.sharing(self.sharing_context)

    @cached_property
    def set_loads(self) -> SetLoads | None:
        """The loads of shared sets, where loads are balanced over a set's layers; else None."""
        if not self.config.moe.balances_sets:
            return None
        experts = tuple(shape.num_experts for shape in self.expert_shapes)
        loads = SetLoads.of(self.sharing_context.sources, experts)
        return loads if loads.width else None

    @cached_property
    def statistics(self) -> StatisticsLayout:
        """The statistics that MoE layers return for each micro-batch."""
        experts = max((shape.num_experts for shape in self.expert_shapes), default=0)
        balance = self.parts.balance(self.config.moe, self.state.dp)
        return StatisticsLayout({"counts": experts, **self.parts.router.statistics, **balance.statistics})


def expert_shape(config: PretrainConfig, spec: LayerSpec) -> ExpertShape:
    """Returns the global sizes of one MoE layer's routed experts, and the spread of their initial weights."""
    model = config.model
    return ExpertShape(
        spec.num_experts,
        model.hidden_size,
        config.expert_ffn_size,
        activation_of(model),
        bias=not model.disable_bias_linear,
        init_std=model.init_method_std,
        output_init_std=model.output_init_std * branch_scale(config, spec.num_experts).routed,
    )
