"""The comparison of the sizes in a checkpoint's configuration with its tensors, before anything is built from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from megatron_samoe.errors import CheckpointError, shown

_NUMBER = re.compile(r"\.(\d{1,7})\.")


def refuse_other_sizes(
    model: Mapping[str, int], shapes: Mapping[str, Iterable[int]], where: str, prefix: str = ""
) -> None:
    """Raises CheckpointError naming a configured size that is far from those of the tensors.

    Smaller differences get a better message where each tensor is compared with the model's.

    Args:
        model: num_layers, and sizes that some tensor must have as a dim.
        shapes: of all tensors by name; the first number in a name is its layer's.
        prefix: prefix of the names that count layers.
    """
    layers = {found[1] for name in shapes if name.startswith(prefix) and (found := _NUMBER.search(name))}
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for name, size in model.items():
        if name == "num_layers" and size > 2 * len(layers) + 100:
            raise CheckpointError(
                f"{where} says num_layers is {shown(size)}; there are tensors of {len(layers)} layers."
            )
        if size > largest + 100:
            raise CheckpointError(f"{where} says {name} is {shown(size)}; no tensor has that size.")
