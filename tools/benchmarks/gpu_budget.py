"""What a GPU would be given to do for an MoE layer: launches, and bytes read and written, from shapes alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_samoe.config import ParallelConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.ops import extension
from megatron_samoe.ops.asynchronous import taken_for_gpu
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.parallel_state import RankGrid
from megatron_samoe.parallel_state.state import planned_state
from tools.benchmarks.harness import ProcessBenchmark, Row, Rows
from tools.benchmarks.layer import Activation, LayerShape, make_halves

#: Launches of our ops on a GPU, as tests count them in the kernels' emulation.
LAUNCHES: Mapping[str, int] = {
    "topk_gate": 2,
    "topk_gate_backward": 1,
    "make_permutation": 3,
    "permute": 1,
    "unpermute": 1,
    "unpermute_backward": 1,
    "combine_banks": 1,
    "combine_banks_backward": 2,
    "swiglu": 1,
    "swiglu_backward": 1,
}
#: Ops of torch that launch nothing, besides views.
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "_unsafe_view", "lift_fresh"}


class LaunchCounter(TorchDispatchMode):
    """Counts launches and bytes of what runs inside this context: `rows`, one for each op that launches something."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    @property
    def launches(self) -> int:
        return sum(row["launches"] for row in self.rows)

    @property
    def num_bytes(self) -> int:
        return sum(row["bytes"] for row in self.rows)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not (func.is_view or name in _FREE):
            operands = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            fresh = [t for t in tree_leaves(results) if isinstance(t, Tensor) and id(t) not in operands]
            written = [
                operand
                for argument, operand in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(operand, Tensor)
            ]
            bytes_moved = sum(t.numel() * t.element_size() for t in (*operands.values(), *fresh, *written))
            self.rows.append({"op": name, "launches": LAUNCHES.get(name, 1), "bytes": bytes_moved})
        return results


@contextlib.contextmanager
def as_on_a_gpu(device_type: str, by_kernels: bool, of_capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Takes a type of device for a GPU of a capability (9.0: an H100), with our kernels or without.

    Raises:
        ConfigError: the environment has chosen the kernels already.
        ExtensionError, ConfigError: as extension.load().
    """
    extension.load()
    if not extension.cuda_kernels_are_chosen():
        variable = extension.CUDA_ENVIRONMENT_VARIABLE
        raise ConfigError(variable, os.environ[variable], "must be auto or unset where both ways are counted")
    with (
        taken_for_gpu(device_type, of_capability),
        extension.trusting(extension.TRAINING_KERNELS if by_kernels else ()),
    ):
        yield


def _counted(run: Callable[[], Any]) -> tuple[LaunchCounter, Any]:
    with LaunchCounter() as counter:
        result = run()
    return counter, result


@dataclass(frozen=True, kw_only=True)
class GpuBudget(ProcessBenchmark):
    """launches and bytes of an MoE layer on a GPU, counted without one

    The layer's own forward and backward run on tensors without storage, by a GPU's algorithms, in bf16: once with our CUDA
    kernels and once by torch alone. An op's bytes are those of its operands and results, each once; us is the time that
    these take at --bandwidth (3.35 TB/s: an H100). What torch's own ops launch inside counts as one. "combine" and its
    backward are a pool's, once a step for all layers.
    """

    name = "gpu-budget"

    tokens: int = 8192
    hidden_size: int = 2048
    ffn_hidden_size: int = 1408
    num_experts: int = 64
    topk: int = 2
    num_layers: int = 24
    """of the pool"""
    num_banks: int = 6
    """of the pool"""
    activation: Activation = "swiglu"
    bandwidth: float = 3.35
    """of the GPU's memory, TB/s"""
    capability: Literal["9.0", "8.0"] = "9.0"
    """of the GPU; 8.0 has no grouped product (A100, consumer cards), so that experts go by blocks"""

    @property
    def shape(self) -> LayerShape:
        """Of the layer."""
        sizes = self.tokens, self.hidden_size, self.ffn_hidden_size, self.num_experts, self.topk
        return LayerShape(*sizes, self.activation, torch.bfloat16)

    def count_layer(self, by_kernels: bool) -> dict[str, LaunchCounter]:
        """Returns what the layer's forward and backward do."""
        state = planned_state(RankGrid.of(ParallelConfig(), 1), 0)
        with as_on_a_gpu("meta", by_kernels, (int(self.capability[0]), 0)):
            forward, backward = make_halves(self.shape, state)
            of_forward, y_TH = _counted(forward)
            of_backward, _ = _counted(lambda: backward(y_TH))
        return {"forward": of_forward, "backward": of_backward}

    def count_pool(self, by_kernels: bool) -> dict[str, LaunchCounter]:
        """Returns what combining a pool's banks for all layers does, and its backward."""
        elements = self.num_experts * self.hidden_size * (self.shape.up_size + self.ffn_hidden_size)
        a_LGP = torch.empty(self.num_layers, 1, self.num_banks, device="meta")
        banks_PGN = torch.empty(self.num_banks, 1, elements, device="meta")
        weights_LGN = torch.empty(self.num_layers, 1, elements, device="meta", dtype=torch.bfloat16)
        gradient_LGN, into_PGN = torch.empty(weights_LGN.shape, device="meta"), torch.empty_like(banks_PGN)
        with as_on_a_gpu("meta", by_kernels, (int(self.capability[0]), 0)):
            of_forward, _ = _counted(lambda: combine_banks(a_LGP, banks_PGN, weights_LGN))
            of_backward, _ = _counted(lambda: combine_banks_backward(a_LGP, banks_PGN, gradient_LGN, into_PGN))
        return {"combine": of_forward, "combine backward": of_backward}

    def rows(self) -> Rows:
        kernels, plain = ({**self.count_layer(how), **self.count_pool(how)} for how in (True, False))
        rows = []
        for part, counter in kernels.items():
            if not part.startswith("combine"):
                rows += [self._row(part, row["op"], row["launches"], row["bytes"]) for row in counter.rows]
        for part in kernels:
            for way, counter in (("kernels", kernels[part]), ("torch", plain[part])):
                rows.append(self._row(part, f"sum, by {way}", counter.launches, counter.num_bytes))
        return rows

    def _row(self, part: str, op: str, launches: int, num_bytes: int) -> Row:
        us = num_bytes / self.bandwidth / 1e6
        return {"part": part, "op": op, "launches": launches, "MB": round(num_bytes / 1e6, 2), "us": round(us, 2)}
