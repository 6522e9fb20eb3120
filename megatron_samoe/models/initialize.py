"""Initial values that do not depend on the layout: each parameter is drawn from a seed made of its global name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_samoe.parallel_state.shard_spec import ShardSpec, get_flat_part, get_shard_spec
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
        spec, part = get_shard_spec(parameter), get_flat_part(parameter)
        shape = part.shape if part is not None else tuple(parameter.shape)
        start, stop = (part.start, part.stop) if part is not None else (0, parameter.numel())
        indexed = init.num_indexed_dims
        first = spec.offsets(shape, state)[:indexed]
        inner_spec = ShardSpec(partition=tuple((d - indexed, axis) for d, axis in spec.partition if d >= indexed))
        inner_shape = inner_spec.global_shape(shape[indexed:], state)
        size = math.prod(shape[indexed:])
        flat = parameter.view(-1)
        for number, local in enumerate(itertools.product(*(range(n) for n in shape[:indexed]))):
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            if low >= high:
                continue
            place = tuple(offset + i for offset, i in zip(first, local, strict=True))
            whole = _draw(inner_shape, init, derived_seed(seed, name, *place))
            values = inner_spec.local_slice(whole, state) + init.mean
            flat[low - start : high - start] = values.reshape(-1)[low - number * size : high - number * size].to(flat)


def _draw(shape: tuple[int, ...], init: Init, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).normal_(generator=generator).mul_(init.std)
