"""Initial values that do not depend on the layout: each parameter is drawn from a seed made of its global name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_samoe.parallel_state.parameter_tag import Init, tag_of
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.random import derived_seed


@torch.no_grad()
def initialize_parameters(parameters: Mapping[str, nn.Parameter], state: ParallelState, seed: int) -> None:
    """Fills parameters, keyed by global name, with their initial values.

    Each is drawn in full, on the CPU in fp32, and cut to this rank's shard. Tensors of experts are drawn one expert at a
    time, so that a rank draws only its own.
    """
    for name, parameter in parameters.items():
        tag = tag_of(parameter)
        init, spec, part = tag.init, tag.shard, tag.slice
        if init.kind != "normal":
            parameter.fill_(1.0 if init.kind == "ones" else 0.0)
            continue
        shape = part.shape if part is not None else tuple(parameter.shape)
        start, stop = (part.start, part.stop) if part is not None else (0, parameter.numel())
        num_leading = part.num_leading_dims if part is not None else 0
        indexed = init.num_indexed_dims
        first = spec.offsets(shape, state)[:indexed]
        inner_spec = ShardSpec(partition=tuple((d - indexed, axis) for d, axis in spec.partition if d >= indexed))
        inner_shape = inner_spec.global_shape(shape[indexed:], state)
        size = math.prod(shape[indexed:])
        rows = parameter.view(math.prod(shape[:num_leading]), -1)
        per_row = math.prod(shape[num_leading:indexed])
        for number, local in enumerate(itertools.product(*(range(n) for n in shape[:indexed]))):
            row, index_in_row = divmod(number, per_row)
            begin = index_in_row * size
            low, high = max(start, begin), min(stop, begin + size)
            if low >= high:
                continue
            index = tuple(offset + i for offset, i in zip(first, local, strict=True))
            full = _draw(inner_shape, init, derived_seed(seed, name, *index))
            values = (inner_spec.local_slice(full, state) + init.mean).reshape(-1)
            rows[row, low - start : high - start] = values[low - begin : high - begin].to(rows)


def _draw(shape: tuple[int, ...], init: Init, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).normal_(generator=generator).mul_(init.std)
