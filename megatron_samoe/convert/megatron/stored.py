"""The content of a Megatron-LM checkpoint of either format, under names of Megatron-Core's local modules."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.convert.megatron.names import FUSED_NORMS, MegatronLayout
from megatron_samoe.errors import CheckpointError, shown

_GROUPED_EXPERT = re.compile(r"mlp\.experts\.linear_fc(\d)\.(weight|bias)(\d+)$")


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        folder: of its file, or of the checkpoint.
        model: its model (chunk) in the file; "" in torch_dist.
        key: its name in the file.
        at: leading indices of a part of the tensor of that name.
        second: key of the tensor that follows it in the first dim, where a gate and its projection are apart.
    """

    folder: Path
    model: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    at: tuple[int, ...] = ()
    second: str = ""


#: (tensor-parallel rank, expert-parallel rank), and canonical names with the number of the layer in the full model.
Index = dict[tuple[int, int], dict[str, Entry]]


@dataclass(frozen=True)
class Stored:
    """An opened checkpoint of Megatron-LM's.

    Attributes:
        where: the file that keeps the arguments.
        layout: of the ranks whose parts the index has.
        read: returns an entry's tensor.
    """

    directory: Path
    where: Path
    arguments: argparse.Namespace
    iteration: int
    layout: MegatronLayout
    index: Index
    read: Callable[[Entry], Tensor]
    notes: tuple[str, ...] = ()


def canonical(key: str) -> str:
    """Returns a key of Megatron-Core's local modules: norms as modules of their own, and experts one by one."""
    for fused, alone in {**FUSED_NORMS, "self_attention.linear_q_proj.": "self_attention.linear_q_up_proj."}.items():
        key = key.replace(fused, alone)
    return _GROUPED_EXPERT.sub(r"mlp.experts.local_experts.\3.linear_fc\1.\2", key)


def count(holder: Any, name: str, default: int, where: object, least: int = 1) -> int:
    """Returns a whole number that a file keeps under a name; CheckpointError where it keeps something else."""
    value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
    value = default if value is None else value
    if type(value) is not int or not least <= value < 2**62:
        raise CheckpointError(f"{where}: {name} is {shown(value)}, which is not a count.")
    return value
