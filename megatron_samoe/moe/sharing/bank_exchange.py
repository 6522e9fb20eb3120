"""The exchange of combined weights and their gradients, used where banks outnumber a stage's MoE layers.

Holders are the ranks of a bank's group: the expert-data-parallel ranks of all pipeline stages. Each holds a slice of all
banks. It combines its slice for all layers and sends every stage the slices of its layers. These are fewer bytes than the
banks, which `bank_store.py` gathers where they are few. Weight gradients go back the same way; holders sum and contract
them. Per step and rank this moves l weights of each kind, not P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.moe.sharing.bank_store import BankStore
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.parallel_state.state import ParallelState


@dataclass(frozen=True)
class BankExchange:
    """Who needs which layers.

    Attributes:
        layers_of_stage: MoE layers of each pipeline stage, by index.
    """

    state: ParallelState
    layers_of_stage: tuple[tuple[int, ...], ...]

    @property
    def own_layers(self) -> tuple[int, ...]:
        """MoE layers of this rank's stage."""
        return self.layers_of_stage[self.state.pp.rank]

    def layers_of_members(self, store: BankStore) -> list[tuple[int, ...]]:
        """Returns the layers of each holder's stage."""
        stages = [self.state.grid.coordinates(rank, "expert")["pp"] for rank in store.group.ranks]
        return [self.layers_of_stage[stage] for stage in stages]

    def all_coefficients(self, a_2lGP: Tensor) -> Tensor:
        """Returns a_2LGP of all stages' layers, from those of this one."""
        num_layers = sum(map(len, self.layers_of_stage))
        a_2LGP = a_2lGP.new_zeros((a_2lGP.shape[0], num_layers, *a_2lGP.shape[2:]))
        a_2LGP[:, list(self.own_layers)] = a_2lGP
        return self.state.pp.all_reduce(a_2LGP)

    def combine(self, store: BankStore, a_LGP: Tensor, weight: Tensor) -> None:
        """Writes this stage's combined weights [l, e, ...]; all holders of the bank call it together."""
        held = store.parameter.detach()
        own = store.columns(store.group.rank)
        combined_Ln = torch.empty((a_LGP.shape[0], held.shape[1]), dtype=weight.dtype, device=held.device)
        for group, part in _segments(store, own, a_LGP.shape[1]):
            combine_banks(a_LGP[:, group : group + 1], held[:, None, part], out_LGN=combined_Ln[:, None, part])
        outgoing = [combined_Ln[list(layers)] for layers in self.layers_of_members(store)]
        flat_lN = weight.view(weight.shape[0], store.num_elements)
        parts = [flat_lN[:, store.columns(member)] for member in range(store.group.size)]
        for part_ln, slices in zip(parts, _all_to_all(store, outgoing, [p.shape for p in parts]), strict=True):
            part_ln.copy_(slices)

    def contract(self, store: BankStore, a_LGP: Tensor, grad: Tensor) -> Tensor:
        """The backward of `combine`: sums all holders' weight gradients, adds the slice's gradient to its main gradient, and
        returns da_LGP.

        The coefficients' gradient is that of all layers, data and elements: the same on all holders.

        Args:
            grad: this rank's weight gradients [l, e, ...].
        """
        flat_lN = grad.reshape(grad.shape[0], store.num_elements)
        members = self.layers_of_members(store)
        outgoing = [flat_lN[:, store.columns(member)] for member in range(store.group.size)]
        own = store.columns(store.group.rank)
        dw_Ln = grad.new_zeros((a_LGP.shape[0], own.stop - own.start))
        received = _all_to_all(store, outgoing, [(len(layers), dw_Ln.shape[1]) for layers in members])
        for layers, slices in zip(members, received, strict=True):
            dw_Ln[list(layers)] += slices
        held, main_grad = store.parameter.detach(), store.parameter.main_grad  # type: ignore[attr-defined]
        da_LGP = torch.zeros_like(a_LGP)
        for group, part in _segments(store, own, a_LGP.shape[1]):
            da_LGP[:, group : group + 1] += combine_banks_backward(
                a_LGP[:, group : group + 1], held[:, None, part], dw_Ln[:, None, part], main_grad[:, None, part]
            )
        return store.group.all_reduce(da_LGP)

    def is_first_of_stage(self, store: BankStore) -> bool:
        """Whether this rank is the one of its stage that keeps the coefficients' gradient, which all holders know."""
        members = self.layers_of_members(store)
        return members.index(self.own_layers) == store.group.rank


def _all_to_all(store: BankStore, outgoing: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Returns one tensor from each member, of the given shapes."""
    sizes = [rows * columns for rows, columns in shapes]
    sent, send_sizes = torch.cat([t.reshape(-1) for t in outgoing]), [t.numel() for t in outgoing]
    group = store.group
    exchange = group.all_to_all_uneven if group.exchange is None else group.exchange.exchange
    received = exchange(sent, send_sizes, sizes)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def _segments(store: BankStore, own: slice, num_groups: int) -> list[tuple[int, slice]]:
    """Returns (coefficient group, part of the slice) pairs: one for all experts, or one for each expert in the slice."""
    size = store.num_elements // num_groups
    segments = []
    for group in range(num_groups):
        low, high = max(own.start, group * size), min(own.stop, (group + 1) * size)
        if low < high:
            segments.append((group, slice(low - own.start, high - own.start)))
    return segments


def exchange_saves(num_banks: int, layers_of_stage: Sequence[Sequence[int]]) -> bool:
    """Whether slices of combined weights are less than the banks on every stage."""
    return num_banks > max(map(len, layers_of_stage), default=0)
