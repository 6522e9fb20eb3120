"""Turns layers that combine banks into ordinary MoE layers while vLLM loads their weights.

A layer whose every expert is one bank's, at most times two factors of the layer, selects: its experts are entries of one
set that all such layers share. Other layers get their own, combined while the weights are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_samoe.convert.hf.folder import HFFolder
from megatron_samoe.errors import CheckpointError
from megatron_samoe.moe.sharing.coefficients import normalize_coefficients

_POOL, _SETS = "model.expert_pool.", "model.expert_pool.sets."
#: Beside the base model, which has no such part.
SELECTED = "selected."


@dataclass(frozen=True)
class Selection:
    """Which entries of the shared set a layer's experts are.

    Attributes:
        places: the entry of each expert, by its index.
        factors: on the first matrices (and biases), and on the second.
    """

    places: tuple[int, ...]
    factors: tuple[float, float]


class Entry(NamedTuple):
    """An expert of the set that all selecting layers share: one bank's first matrices and one bank's second."""

    bank_of_first: int
    bank_of_second: int
    expert: int


@dataclass(frozen=True)
class ExpertsPlan:
    """How the layers that combine banks are served.

    Attributes:
        coefficients: by layer, [2, E, P]: weights of banks for the first and the second matrices.
        selections: by layer that selects.
        entries: of the shared set.
    """

    coefficients: Mapping[int, Tensor]
    selections: Mapping[int, Selection]
    entries: tuple[Entry, ...]

    def weights(self, kind: str, bank: Tensor, experts: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yields names and tensors of ordinary experts that a tensor of the banks becomes: the shared set, then other layers' own.

        Args:
            kind: last part of its name, such as gate_up_proj.
            bank: [P * E, ...], or [P, E, ...] as earlier versions wrote it.
            experts: name of packed experts.
        """
        is_second, own_dims = kind.startswith("down"), 1 if kind.endswith("bias") else 2
        num_experts = next(iter(self.coefficients.values())).shape[1]
        bank = bank.reshape(-1, num_experts, *bank.shape[-own_dims:])
        if self.entries:
            banks = [entry.bank_of_second if is_second else entry.bank_of_first for entry in self.entries]
            yield f"{SELECTED}{experts}.{kind}", bank[banks, [entry.expert for entry in self.entries]].to(dtype)
        for layer, a_2EP in self.coefficients.items():
            if layer not in self.selections:
                a_EP = a_2EP[int(is_second)].to(bank.device, bank.dtype)
                w = torch.stack([torch.tensordot(a_P, bank[:, e], dims=1) for e, a_P in enumerate(a_EP)])
                yield f"model.layers.{layer}.mlp.{experts}.{kind}", w.to(dtype)


def kind_of_bank(name: str) -> str | None:
    """Returns the last name of a tensor of banks, such as gate_up_proj; None for any other tensor."""
    return name.rpartition(".")[2] if name.startswith(_POOL) and not name.startswith(_SETS) else None


def plan_experts(config: Any, read: Callable[[str], Tensor]) -> ExpertsPlan:
    """Returns the plan of a configuration of our class.

    Args:
        read: gives a tensor by its name.

    Raises:
        CheckpointError: layers combine more than one pool.
    """
    pools = {source.bank for source in config.expert_sources() if source is not None and source.combines}
    if len(pools) > 1:
        raise CheckpointError(f"vLLM serves a model with one pool, and this one has {', '.join(sorted(pools))}.")
    coefficients, selections = {}, {}
    entries: dict[Entry, int] = {}
    for layer, source in enumerate(config.expert_sources()):
        if source is None or not source.combines:
            continue
        raw = read(f"model.layers.{layer}.mlp.combination").float()
        a_2EP = coefficients[layer] = normalize_coefficients(raw, source.normalization).expand(
            -1, source.num_experts, -1
        )
        if (factors := _factors(a_2EP)) is not None:
            first_E, second_E = a_2EP.abs().argmax(-1).tolist()
            keys = map(Entry, first_E, second_E, range(source.num_experts))
            selections[layer] = Selection(tuple(entries.setdefault(key, len(entries)) for key in keys), factors)
    return ExpertsPlan(coefficients, selections, tuple(entries))


def _factors(a_2EP: Tensor) -> tuple[float, float] | None:
    """Returns a layer's factors on one bank of each expert; None where it combines several, or experts' factors differ."""
    if ((a_2EP != 0).sum(-1) != 1).any():
        return None
    factor_2E = a_2EP.sum(-1)
    return None if (factor_2E != factor_2E[:, :1]).any() else (float(factor_2E[0, 0]), float(factor_2E[1, 0]))


def without_combining(config: Any) -> Any:
    """Returns a copy of a configuration in which layers that combine banks have their own experts."""
    config = copy.deepcopy(config)
    sources = [source for source in config.expert_sources() if source is not None]
    if any(source.combines for source in sources):
        counts = [source.num_experts for source in sources]
        config.num_experts = counts[0] if len(set(counts)) == 1 else counts
        config.expert_layout, config.expert_sharing = "moe", None
        config.lent_experts = [(None, 1, None) if source.combines else source[:3] for source in sources]
    return config


def folder_reader(folder: Path) -> Callable[[str], Tensor]:
    """Returns a function that reads a tensor of a folder by its name.

    Raises (the function):
        CheckpointError: the folder has no such tensor.
    """
    files = HFFolder(folder)

    def read(name: str) -> Tensor:
        if name not in files.tensors:
            is_older = "model.embedding.word.weight" in files.tensors
            older = " It has the names of version 0.1: convert the model again." * is_older
            raise CheckpointError(f"{folder} has no tensor {name}.{older}")
        return files.read(name)

    return read
