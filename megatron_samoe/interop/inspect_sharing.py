"""Which MoE layers of a checkpoint use which stored experts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_samoe.config.sharing_map import written_map
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors
from megatron_samoe.interop.edited_model import moe_layers, source_config
from megatron_samoe.interop.layer_experts import source_of, stored_experts


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
    users: dict[str, list[int]] = {}
    for i, place in enumerate(places):
        users.setdefault(stored_experts(place), []).append(i)
    stores = []
    for stored, own in users.items():
        first, tensors = places[own[0]], [t for name, t in source.tensors.items() if name.startswith(stored)]
        way = source_of(first).way
        banks = tensors[0].shape[0] if way == "combined" and tensors else 1
        name = {"own": f"own of layer {first.index}", "combined": f"pool of {banks} banks"}.get(
            way, f"set {source_of(first).number} ({way})"
        )
        layers, size = tuple(places[i].index for i in own), sum(t.num_bytes for t in tensors)
        elements = sum(t.num_elements for t in tensors)
        stores.append(Store(name, first.num_experts, banks, layers, elements, size))
    return written_map([source_of(place) for place in places]) if places else "", stores
