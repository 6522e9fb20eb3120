"""The experts that each MoE layer computes with, whatever layers share, read from a checkpoint tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import ExpertSource
from megatron_samoe.convert.edited_model import (
    EXPERT_WEIGHTS,
    SHARED,
    EditedModel,
    ReadOnce,
    add_fractions,
    begin_edit,
    compute_dtype,
    moe_layers,
    source_config,
)
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.models.layer_layout import LayerSpec
from megatron_samoe.models.mlp import activation_of
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT, normalize_coefficients
from megatron_samoe.moe.sharing.combined import combine
from megatron_samoe.ops.grouped_mlp import ExpertWeights

#: Gives the tensors [P, E, ...] of a kind from which a layer's weights come.
Whole = Callable[[LayerSpec, str], Tensor]


def source_of(place: LayerSpec) -> ExpertSource:
    """Returns where an MoE layer's experts come from."""
    assert place.source is not None
    return place.source


def stored_experts(place: LayerSpec) -> str:
    """Returns what the names of the tensors begin with that an MoE layer's experts come from."""
    return source_of(place).stored(place.index)


class LayerExperts:
    """Reads effective weights of experts, and makes models whose layers come by them otherwise.

    Attributes:
        layers: those that have experts.
        kinds: tensors of an expert, in the order of reading that lets a bank be read once for all layers.
        dtype: of the weights.
        activation: between an expert's matrices.
    """

    def __init__(self, source: GlobalTensors):
        self.config = source_config(source)
        self.layers = moe_layers(self.config)
        self.dtype = compute_dtype(source)
        self.activation = activation_of(self.config.model)
        self._source, self._read_once = source, ReadOnce(source)
        self.kinds = [k for k in EXPERT_WEIGHTS if k[0] == "w" or not self.config.model.disable_bias_linear]

    def shape(self, place: LayerSpec, kind: str) -> tuple[int, ...]:
        """Returns the shape [E, ...] of a layer's weights."""
        shape = self._source.tensors[stored_experts(place) + kind].shape
        return shape[1:] if source_of(place).way.is_shared else shape

    def read(self, place: LayerSpec, kind: str) -> Tensor:
        """Returns a layer's weights [E, ...], as training makes them; not to be changed."""
        stored, way = self._read_once(stored_experts(place) + kind), source_of(place).way
        if not way.is_shared:
            return stored
        if not way.mixes:
            return stored[0].to(self.dtype)
        a_GP = self.coefficients(place)[ROW_OF_WEIGHT[kind]]
        out = stored.new_empty((1, *stored.shape[1:]), dtype=self.dtype)
        return combine(a_GP[None].to(stored.dtype), stored, out)[0]

    def weights(self, place: LayerSpec) -> ExpertWeights:
        """Returns all of a layer's weights in fp32."""
        return ExpertWeights(**{kind: self.read(place, kind).float() for kind in self.kinds})

    def coefficients(self, place: LayerSpec) -> Tensor:
        """Returns a layer's weights of banks [2, G, P], or its factors on its set [2, 1, 1], normalised as the model does."""
        raw, moe = self._source.read(f"layers.{place.index}.moe.combination"), self.config.moe
        return normalize_coefficients(raw, moe.samoe_normalization if source_of(place).way.combines else "none")

    def whole(self, place: LayerSpec, kind: str) -> Tensor:
        """Returns what a layer's weights come from, [P, E, ...], where a set or the layer's own are one bank; not to be changed."""
        stored = self._read_once(stored_experts(place) + kind)
        return stored if source_of(place).way.is_shared else stored[None]

    def reshared(self, config: PretrainConfig, sources: Sequence[ExpertSource], whole: Whole) -> EditedModel:
        """Returns the model whose layers have other sources of experts, as yet without coefficients of what they mix.

        Args:
            config: of the new model.
            sources: of each MoE layer there.
            whole: gives what a layer's weights come from there; what layers share is asked of the first.

        Raises:
            ConfigErrors: the new configuration is not legal.
        """
        edited = begin_edit(self._source, config, lambda name: not is_experts(name))
        indices = [place.index for place in self.layers]
        self.add_to(edited, list(zip(self.layers, sources, indices, strict=True)), whole)
        add_fractions(edited, self._source, [place.num_experts for place in self.layers])
        return edited

    def add_to(
        self, edited: EditedModel, layers: Sequence[tuple[LayerSpec, ExpertSource, int]], whole: Whole | None = None
    ) -> None:
        """Adds experts to a new model.

        Args:
            layers: MoE layers, the sources of their experts there, and their numbers there.
            whole: gives what a layer's weights come from there; what they come from now if not given.
        """
        num_banks = source_config(edited).moe.num_expert_banks
        for kind in self.kinds:
            for place, source, layer in sorted(layers, key=lambda entry: stored_experts(entry[0])):
                name, shape = source.stored(layer) + kind, self.shape(place, kind)
                recipe = partial(whole or self.whole, place, kind)
                if not source.way.is_shared:
                    edited.add(name, shape, self.dtype, partial(_only, recipe))
                elif name not in edited.tensors:
                    banks = num_banks if source.way.combines else 1
                    # What is shared is its own master weight, fp32 in every precision.
                    edited.add(name, (banks, *shape), torch.float32, recipe)


def _only(recipe: Callable[[], Tensor]) -> Tensor:
    return recipe()[0]


def layer_of(name: str) -> int | None:
    """Returns the number of the layer that a tensor belongs to; None for one outside the layers."""
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def is_experts(name: str) -> bool:
    """Whether a tensor is of routed experts, or says how a layer uses those that are shared."""
    return name.startswith(SHARED) or ".moe.experts." in name or name.endswith(".moe.combination")
