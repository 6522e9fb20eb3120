"""The interface of a way of sharing experts: who owns which weights, and how a layer gets its experts from them.

The rank's model asks the way for what each MoE layer owns, for what all layers share, and for a lender that hands each
layer its experts in every call; no layer keeps what is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.sharing_map import ExpertSource
from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.grouped_mlp import Activation, ExpertWeights
from megatron_samoe.parallel_state.state import ParallelState


@dataclass(frozen=True)
class SharingContext:
    """The model and rank that a way is made for.

    Attributes:
        sources: where each MoE layer's experts come from, as --expert-sharing says.
        shapes: of the experts of each MoE layer of the full model.
        layers_of_stage: indices, among MoE layers, of those that each pipeline stage holds.
        dtype: of weights and activations.
        serving: how a pool is lent where a model decodes and does not train; see `inference/serving.py`.
    """

    config: MoEConfig
    sources: tuple[ExpertSource, ...]
    shapes: tuple[ExpertShape, ...]
    layers_of_stage: tuple[tuple[int, ...], ...]
    state: ParallelState
    dtype: torch.dtype
    serving: Literal["folded", "on-the-fly", "selected"] | None = None

    def of_layers(self, layers: Sequence[int]) -> SharingContext:
        """Returns the context of some MoE layers only, numbered from 0."""
        position = {moe_index: i for i, moe_index in enumerate(layers)}
        return replace(
            self,
            sources=tuple(self.sources[i] for i in layers),
            shapes=tuple(self.shapes[i] for i in layers),
            layers_of_stage=tuple(tuple(position[i] for i in stage if i in position) for stage in self.layers_of_stage),
        )

    def stages_of(self, layers: Sequence[int]) -> list[int]:
        """Returns the pipeline stages that hold any of these MoE layers."""
        return [stage for stage, held in enumerate(self.layers_of_stage) if set(held) & set(layers)]


@dataclass(frozen=True)
class LenderCosts:
    """The cost of lending on one rank, without parameters, their gradients and optimizer state, for the planner.

    Attributes:
        weights, gradients: bytes held from step to step.
        gathered: bytes of unsharded banks that are held through a step.
        exchange: bytes of the largest temporary at the beginning or end of a step, when no activations exist.
        workspace: bytes that one layer's backward pass needs.
        sent: bytes that sharded banks make a rank send in a step, by the group that exchanges them, before the factor
            (size - 1) / size.
        traffic_per_step, traffic_per_pass: bytes of memory that are read and written.
    """

    weights: int = 0
    gradients: int = 0
    gathered: int = 0
    exchange: int = 0
    workspace: int = 0
    sent: Mapping[str, float] = field(default_factory=dict)
    traffic_per_step: int = 0
    traffic_per_pass: int = 0

    @staticmethod
    def of_all(costs: Sequence[LenderCosts]) -> LenderCosts:
        """Returns the costs of several lenders on one rank; exchanges and layers come one after the other."""
        sums = {f.name: sum(getattr(c, f.name) for c in costs) for f in fields(LenderCosts) if f.name != "sent"}
        sums |= {name: max((getattr(c, name) for c in costs), default=0) for name in ("exchange", "workspace")}
        sent = {group: sum(c.sent.get(group, 0) for c in costs) for group in sorted({g for c in costs for g in c.sent})}
        return LenderCosts(sent=sent, **sums)


class ExpertLender(Protocol):
    """Lends experts to layers during one optimizer step."""

    def begin_step(self) -> None:
        """Takes in the current weights; to be called whenever they have changed."""

    def experts(self, moe_index: int) -> Experts:
        """Returns the experts of an MoE layer."""

    def finish_step(self) -> None:
        """Completes the gradients of what is shared, in their main gradients; those of sharded banks are summed over
        their holders, which call it together."""

    def costs(self) -> LenderCosts:
        """Returns what lending takes, also of a model without storage: nothing, unless a lender says more."""
        return LenderCosts()

    def layer_gradients(self) -> Mapping[int, ExpertWeights] | None:
        """Returns this rank's gradients so far of each layer's (effective) weights, by index of the MoE layer; None where
        they are not kept."""
        return None


class Banks(Protocol):
    """Experts that are kept together on one rank.

    Attributes:
        is_sharded: whether this rank holds a slice of them.
        bank_numel: elements of one unsharded bank.
    """

    activation: Activation
    is_sharded: bool

    @property
    def bank_numel(self) -> int: ...

    def unsharded(self) -> ExpertWeights:
        """Returns the banks [P, E, ...]; ranks that hold slices call it together."""
        ...


@dataclass(frozen=True)
class Mixture:
    """The composition of one layer's experts: W[e] = sum_p a[g, p] bank[p, e], or the only bank as it is.

    Attributes:
        a_2GP: weights of banks, a row for w1 and b1 and one for w2 and b2; G is 1 or the rank's experts. None for the bank
            as it is.
        combines: whether there may be several banks, so that it matters how they are served.
    """

    banks: Banks
    a_2GP: Tensor | None = None
    combines: bool = False


class SharingWay(Protocol):
    """How the MoE layers of a model come by their experts. Made with a `SharingContext`."""

    def layer_part(self, moe_index: int) -> nn.Module:
        """Returns what one layer owns: its experts, or how it uses those that are shared."""

    def shared_part(self) -> nn.Module | None:
        """Returns what all layers share on this rank; its parameters are checkpointed under `expert_pool`."""

    def lender(self, layer_parts: Mapping[int, nn.Module], shared_part: nn.Module | None) -> ExpertLender:
        """Returns the lender of this rank.

        Args:
            layer_parts: by index of the MoE layer, of those on this rank; maybe none.
        """
        ...

    def mixture(self, moe_index: int, layer_part: nn.Module, shared_part: nn.Module | None) -> Mixture:
        """Returns what a layer's experts are made of, without gradients: by it a model decodes, is folded and is shown.

        Raises:
            ConfigError: the way's experts are not mixtures of banks; such a model trains, and is not decoded.
        """
        ...
