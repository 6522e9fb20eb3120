"""Initial values that do not depend on the layout: each parameter is drawn from a seed made of its global name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_samoe.parallel_state.shard_spec import ShardSpec, get_shard_spec
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import Init
from megatron_samoe.tensor_parallel.random import derived_seed


@torch.no_grad()
def initialize_parameters(parameters: Mapping[str, nn.Parameter], state: ParallelState, seed: int) -> None:
    """Fills parameters, keyed by global name, with their initial values.

    Each is drawn whole, on the CPU in fp32, and cut to this rank's part; tensors of experts are drawn one expert at a
    time, so that a rank draws only its own.
    """
    for name, parameter in parameters.items():
        init: Init = parameter.init  # type: ignore[attr-defined]
        if init.kind != "normal":
            parameter.fill_(1.0 if init.kind == "ones" else 0.0)
            continue
        spec = get_shard_spec(parameter)
        indexed = init.num_indexed_dims
        first = spec.offsets(parameter.shape, state)[:indexed]
        inner_spec = ShardSpec(partition=tuple((d - indexed, axis) for d, axis in spec.partition if d >= indexed))
        inner_shape = inner_spec.global_shape(parameter.shape[indexed:], state)
        for local in itertools.product(*(range(n) for n in parameter.shape[:indexed])):
            place = tuple(start + i for start, i in zip(first, local, strict=True))
            whole = _draw(inner_shape, init, derived_seed(seed, name, *place))
            mean = init.mean.to(parameter) if isinstance(init.mean, Tensor) else init.mean
            parameter[local].copy_(inner_spec.local_slice(whole, state))
            parameter[local].add_(mean)


def _draw(shape: tuple[int, ...], init: Init, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).normal_(generator=generator).mul_(init.std)
