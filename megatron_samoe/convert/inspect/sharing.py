"""Which MoE layers of a checkpoint use which stored experts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_samoe.config.sharing_map import written_map
from megatron_samoe.convert.edited_model import moe_layers, source_config
from megatron_samoe.convert.layer_experts import source_of, stored_experts
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors


@dataclass(frozen=True)
class Store:
    """Experts that are stored together.

    Attributes:
        name: the pool of banks, a set, or a layer's own.
        num_experts: that each of its layers chooses from.
        num_banks: full sets of experts that it has.
        layers: that use it, among all.
        elements, num_bytes: of its tensors.
    """

    name: str
    num_experts: int
    num_banks: int
    layers: tuple[int, ...]
    elements: int
    num_bytes: int


def described_sharing(source: GlobalTensors) -> tuple[str, list[Store]]:
    """Returns the whole map, an entry for each MoE layer, and what is stored, in the order of first use."""
    places = moe_layers(source_config(source))
    stores = []
    for stored in dict.fromkeys(map(stored_experts, places)):
        users = [place for place in places if stored_experts(place) == stored]
        tensors = [t for name, t in source.tensors.items() if name.startswith(stored)]
        used = source_of(users[0])
        banks = tensors[0].shape[0] if used.way.combines and tensors else 1
        named = f"pool of {banks} banks" if used.way.combines else f"own of layer {users[0].index}"
        named = f"set {used.number} ({used.way.name})" if used.way.in_sets else named
        layers = tuple(place.index for place in users)
        size = sum(t.num_elements for t in tensors), sum(t.num_bytes for t in tensors)
        stores.append(Store(named, users[0].num_experts, banks, layers, *size))
    return written_map([source_of(place) for place in places]) if places else "", stores
