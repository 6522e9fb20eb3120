"""The experts that each MoE layer computes with, whatever layers share, read from a checkpoint tensor by tensor."""

from __future__ import annotations

from torch import Tensor

from megatron_samoe.config.sharing_map import Source
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.interop.edited_model import (
    EXPERT_WEIGHTS,
    POOL,
    SETS,
    ReadOnce,
    compute_dtype,
    moe_layers,
    source_config,
)
from megatron_samoe.models.layer_layout import LayerPlace
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT, normalize_coefficients
from megatron_samoe.moe.sharing.combined import combine


def source_of(place: LayerPlace) -> Source:
    """Returns where an MoE layer's experts come from."""
    assert place.source is not None
    return place.source


def stored_experts(place: LayerPlace) -> str:
    """Returns what the names of the tensors begin with that an MoE layer's experts come from."""
    source = source_of(place)
    if source.way == "own":
        return f"layers.{place.index}.moe.experts."
    return POOL if source.way == "combined" else f"{SETS}{source.number}."


class LayerExperts:
    """Reads effective weights of experts.

    Attributes:
        layers: those that have experts.
        kinds: tensors of an expert, in the order of reading that lets a bank be read once for all layers.
        dtype: of the weights.
    """

    def __init__(self, source: GlobalTensors):
        self.config = source_config(source)
        self.layers = moe_layers(self.config)
        self.dtype = compute_dtype(source)
        self._source, self._read_once = source, ReadOnce(source)
        self.kinds = [k for k in EXPERT_WEIGHTS if k[0] == "w" or not self.config.model.disable_bias_linear]

    def shape(self, place: LayerPlace, kind: str) -> tuple[int, ...]:
        """Returns the shape [E, ...] of a layer's weights."""
        shape = self._source.tensors[stored_experts(place) + kind].shape
        return shape if source_of(place).way == "own" else shape[1:]

    def read(self, place: LayerPlace, kind: str) -> Tensor:
        """Returns a layer's weights [E, ...], as training makes them; not to be changed."""
        stored, way = self._read_once(stored_experts(place) + kind), source_of(place).way
        if way == "own":
            return stored
        if way == "tied":
            return stored[0].to(self.dtype)
        a_GP = self.coefficients(place)[ROW_OF_WEIGHT[kind]]
        out = stored.new_empty((1, *stored.shape[1:]), dtype=self.dtype)
        return combine(a_GP[None].to(stored.dtype), stored, out)[0]

    def coefficients(self, place: LayerPlace) -> Tensor:
        """Returns a layer's weights of banks [2, G, P], or its factors on its set [2, 1, 1], normalised as the model does."""
        raw, moe = self._source.read(f"layers.{place.index}.moe.combination"), self.config.moe
        return normalize_coefficients(raw, moe.samoe_normalization if source_of(place).way == "combined" else "none")

    def banks(self, place: LayerPlace, kind: str) -> Tensor:
        """Returns the banks [P, E, ...] that a layer combines, or its set as the only one; not to be changed."""
        return self._read_once(stored_experts(place) + kind)


def is_experts(name: str) -> bool:
    """Whether a tensor is of routed experts, or says how a layer uses those that are shared."""
    return name.startswith((POOL, SETS)) or ".moe.experts." in name or name.endswith(".moe.combination")
